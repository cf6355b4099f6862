// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; seven rounds
// are the fewest that pass BigCrush) and the dropout mask built on it: one place, so that every
// kernel draws the same mask.
//
// A mask element is a pure function of (seed, offset, row, column) and of nothing else: not of the
// tile, the grid or the device. It is made in units of 32 elements: 8 neighbouring columns
// (8 c + j) of the 4 rows 32 R + 8 i + s, element b = 8 i + j, from sixteen bit planes:
//   key = seed, low word first
//   counter = (offset low, offset high, 4 c + q, 8 R + s), q = 0..3
//   output w of call q is plane k = 4 q + w
//   bit b of plane k is bit k of element b's 16-bit number
// An element is kept when number + keep carries out of sixteen bits, keep being 0..65536.
// Between kernels a mask travels as words, one a unit: word (8 R + s, c).
#pragma once

#include "common/index.cuh"

namespace fastlora {

struct Philox4 {
  uint32_t word[4];
};

constexpr uint32_t kKeepAll = 65536;

FASTLORA_HOST_DEVICE Philox4 philox4x32(uint32_t key0, uint32_t key1, Philox4 counter) {
  constexpr int kRounds = 7;
  constexpr uint64_t kMul0 = 0xD2511F53, kMul1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = kMul0 * counter.word[0];
    const uint64_t product1 = kMul1 * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The calls of a unit that decide anything are those from this one on: planes below the lowest set
// bit of `keep` do not.
FASTLORA_HOST_DEVICE uint32_t first_call(uint32_t keep) {
  uint32_t call = 0;
  while (call < 3 && (keep >> (4 * call) & 15) == 0) ++call;
  return call;
}

// The unit of columns 8 c .. 8 c + 7 in rows 32 R + s + {0, 8, 16, 24}, where unit_row = 8 R + s.
FASTLORA_HOST_DEVICE uint32_t keep_bits(uint64_t seed, uint64_t offset, uint32_t unit_row,
                                        uint32_t c, uint32_t keep) {
  // 32 additions at a time, from the lowest plane up: a full adder's carry is a majority.
  uint32_t carry = 0;
  for (uint32_t call = first_call(keep); call < 4; ++call) {
    const Philox4 planes =
        philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                   {{static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32),
                     4 * c + call, unit_row}});
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t plane = planes.word[i];
      const uint32_t bit = 0u - (keep >> (4 * call + i) & 1);
      carry = (plane & carry) | (bit & (plane | carry));
    }
  }
  return carry | (0u - (keep >> 16));
}

}  // namespace fastlora
