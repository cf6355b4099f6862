// The mask of philox.cuh, bit for bit, for kernels that draw a whole tile of it: what depends on
// the word's column only, or on its unit row only, is computed once for many words. The counter
// holds the column in one of its words and the unit row in another, so that they first meet in
// round 3 of 7: of a call's 14 products 9 are left, and 11 of its 14 three-way exclusive ors.
#pragma once

#include <type_traits>

#include "common/philox.cuh"

namespace fastlora {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53, kPhiloxMul1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;

// Part of a call (4 word column + q): what does not depend on the unit row.
struct PhiloxColumn {
  uint32_t a, b, c, d;
};

// Part of a unit row: what does not depend on the column.
struct PhiloxRow {
  uint32_t a, b;
};

FASTLORA_HOST_DEVICE uint32_t high_half(uint64_t product) {
  return static_cast<uint32_t>(product >> 32);
}
FASTLORA_HOST_DEVICE uint32_t low_half(uint64_t product) { return static_cast<uint32_t>(product); }

struct PhiloxState {
  uint32_t key0, key1;
  uint32_t offset_high, offset_product_high, offset_product_low;

  PhiloxState() = default;
  FASTLORA_HOST_DEVICE PhiloxState(uint64_t seed, uint64_t offset)
      : key0(static_cast<uint32_t>(seed)), key1(static_cast<uint32_t>(seed >> 32)) {
    const uint64_t product = uint64_t{kPhiloxMul0} * static_cast<uint32_t>(offset);
    offset_high = static_cast<uint32_t>(offset >> 32);
    offset_product_high = high_half(product);
    offset_product_low = low_half(product);
  }

  FASTLORA_HOST_DEVICE uint32_t round_key0(uint32_t round) const {
    return key0 + round * kPhiloxWeyl0;
  }
  FASTLORA_HOST_DEVICE uint32_t round_key1(uint32_t round) const {
    return key1 + round * kPhiloxWeyl1;
  }

  FASTLORA_HOST_DEVICE PhiloxColumn column(uint32_t call) const {
    const uint64_t first = uint64_t{kPhiloxMul1} * call;
    const uint64_t second =
        uint64_t{kPhiloxMul0} * (high_half(first) ^ offset_high ^ round_key0(0));
    const uint64_t third =
        uint64_t{kPhiloxMul1} * (high_half(second) ^ offset_product_low ^ round_key1(1));
    return {low_half(first) ^ round_key0(1), high_half(third) ^ round_key0(2), low_half(third),
            low_half(second) ^ round_key1(2)};
  }

  FASTLORA_HOST_DEVICE PhiloxRow row(uint32_t row) const {
    const uint64_t product = uint64_t{kPhiloxMul1} * (offset_product_high ^ row ^ round_key1(0));
    return {high_half(product), low_half(product)};
  }

  // The call's four output words.
  FASTLORA_HOST_DEVICE Philox4 draw(const PhiloxColumn& column, const PhiloxRow& row) const {
    const uint64_t product = uint64_t{kPhiloxMul0} * (row.a ^ column.a);
    Philox4 c = {{column.b ^ row.b, column.c, high_half(product) ^ column.d, low_half(product)}};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (uint32_t round = 3; round < 7; ++round) {
      const uint64_t product0 = uint64_t{kPhiloxMul0} * c.word[0];
      const uint64_t product1 = uint64_t{kPhiloxMul1} * c.word[2];
      c = {{high_half(product1) ^ c.word[1] ^ round_key0(round), low_half(product1),
            high_half(product0) ^ c.word[3] ^ round_key1(round), low_half(product0)}};
    }
    return c;
  }
};

// Bits i of 32 additions number + keep, for the planes i = 4 call .. 4 call + 3.
FASTLORA_HOST_DEVICE uint32_t add_planes(uint32_t carry, const Philox4& planes, uint32_t call,
                                         uint32_t keep) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t plane = planes.word[i];
    const uint32_t bit = 0u - (keep >> (4 * call + i) & 1);
    carry = (plane & carry) | (bit & (plane | carry));
  }
  return carry;
}

// The last kCalls of a word's four calls, which are all that decide: kCalls = 4 - first_call(keep).
template <int kCalls>
struct PhiloxWordColumns {
  PhiloxColumn call[kCalls];

  FASTLORA_HOST_DEVICE PhiloxWordColumns(const PhiloxState& state, uint32_t word) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (uint32_t i = 0; i < kCalls; ++i) call[i] = state.column(4 * word + 4 - kCalls + i);
  }
};

// Equal to keep_bits() of that column and unit row.
template <int kCalls>
FASTLORA_HOST_DEVICE uint32_t keep_word(const PhiloxState& state,
                                        const PhiloxWordColumns<kCalls>& columns,
                                        const PhiloxRow& row, uint32_t keep) {
  Philox4 planes[kCalls];  // all calls first: independent chains to fill the pipes
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (uint32_t i = 0; i < kCalls; ++i) planes[i] = state.draw(columns.call[i], row);
  uint32_t carry = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (uint32_t i = 0; i < kCalls; ++i) {
    carry = add_planes(carry, planes[i], 4 - kCalls + i, keep);
  }
  return carry | (0u - (keep >> 16));
}

// body(std::integral_constant<int, calls>): code of its own for each number of calls of Philox,
// which then run side by side.
template <class Body>
FASTLORA_HOST_DEVICE void with_calls(int calls, const Body& body) {
  switch (calls) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    default:
      return body(std::integral_constant<int, 4>());
  }
}

}  // namespace fastlora
