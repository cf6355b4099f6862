// Quantises and dequantises ranges of blocks on the CPU.
//
// A block has 16 different values: they are scaled and rounded once, and 16 bytes of codes are then
// looked up at a time, by shuffles of the values' low and high bytes.
#include <algorithm>
#include <cstring>

#include "nf4/code.cuh"

// Shuffles want SSSE3 and more: the loader picks the version for the machine.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTLORA_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define FASTLORA_CLONES
#endif

namespace fastlora {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To nearest, ties to even; NaN as torch writes it.
uint16_t to_bfloat16(float value) {
  if (value != value) return 0x7FC0;
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const float size = std::fabs(value);
  if (size != size) return static_cast<uint16_t>(sign | 0x7E00);
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00);
  // Below 2^-14 halves are 2^-24 apart: the sum leaves the rounded count in its last bits.
  if (size < 6.103515625e-05f) {
    return static_cast<uint16_t>(sign | (bits_of(size + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t kept = bits_of(size) - (112u << 23);
  return static_cast<uint16_t>(sign | (kept + 0xFFF + (kept >> 13 & 1)) >> 13);
}

float from_bfloat16(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }

float from_float16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16, rest = value & 0x7FFF;
  if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  if (rest < 0x400)
    return float_of(sign | bits_of(static_cast<float>(rest) * 5.9604644775390625e-08f));
  return float_of(sign | ((rest << 13) + (112u << 23)));
}

float scale_of(const Nf4Scales& scales, int64_t block) {
  if (scales.absmax != nullptr) return scales.absmax[block];
  const float product =
      scales.nested_code[scales.codes[block]] * scales.nested_absmax[block >> scales.nested_shift];
  return product + *scales.offset;
}

// out[2 i], out[2 i + 1]: the values of the high and the low half of byte i.
template <class T>
void look_up_one_by_one(const uint8_t* codes, const T (&values)[16], int64_t bytes, T* out) {
  for (int64_t i = 0; i < bytes; ++i) {
    out[2 * i] = values[codes[i] >> 4];
    out[2 * i + 1] = values[codes[i] & 15];
  }
}

#if defined(__GNUC__) && !defined(__clang__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
using Bytes = uint8_t __attribute__((vector_size(16)));

FASTLORA_CLONES
void look_up(const uint8_t* codes, const uint16_t (&values)[16], int64_t bytes, uint16_t* out) {
  using Pairs = uint16_t __attribute__((vector_size(16)));
  constexpr Bytes kFirst = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Bytes kLast = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  constexpr Pairs kFirstPairs = {0, 8, 1, 9, 2, 10, 3, 11};
  constexpr Pairs kLastPairs = {4, 12, 5, 13, 6, 14, 7, 15};
  Bytes low, high;
  for (int i = 0; i < 16; ++i) {
    low[i] = static_cast<uint8_t>(values[i]);
    high[i] = static_cast<uint8_t>(values[i] >> 8);
  }
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    Bytes packed;
    std::memcpy(&packed, codes + i, 16);
    const Bytes even = packed >> 4, odd = packed & 15;
    const Bytes even_low = __builtin_shuffle(low, even), even_high = __builtin_shuffle(high, even);
    const Bytes odd_low = __builtin_shuffle(low, odd), odd_high = __builtin_shuffle(high, odd);
    const auto evens = [&](const Bytes& which) {
      return reinterpret_cast<Pairs>(__builtin_shuffle(even_low, even_high, which));
    };
    const auto odds = [&](const Bytes& which) {
      return reinterpret_cast<Pairs>(__builtin_shuffle(odd_low, odd_high, which));
    };
    const Pairs done[4] = {__builtin_shuffle(evens(kFirst), odds(kFirst), kFirstPairs),
                           __builtin_shuffle(evens(kFirst), odds(kFirst), kLastPairs),
                           __builtin_shuffle(evens(kLast), odds(kLast), kFirstPairs),
                           __builtin_shuffle(evens(kLast), odds(kLast), kLastPairs)};
    std::memcpy(out + 2 * i, done, 64);
  }
  look_up_one_by_one(codes + i, values, bytes - i, out + 2 * i);
}
#else
void look_up(const uint8_t* codes, const uint16_t (&values)[16], int64_t bytes, uint16_t* out) {
  look_up_one_by_one(codes, values, bytes, out);
}
#endif
void look_up(const uint8_t* codes, const float (&values)[16], int64_t bytes, float* out) {
  look_up_one_by_one(codes, values, bytes, out);
}

template <class T, class Round>
void dequantize(const Nf4Dequantize& p, int64_t first_block, int64_t last_block, Round round) {
  const CodeBook& book = p.fp4 ? kFp4 : kNf4;
  const int64_t end = p.begin + p.count;
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t from = std::max(p.begin, block << p.block_shift);
    const int64_t to = std::min(end, (block + 1) << p.block_shift);
    const float scale = scale_of(p.scales, block);
    T values[16];
    for (int i = 0; i < 16; ++i) values[i] = round(book.value[i] * scale);
    T* const out = static_cast<T*>(p.out) + (from - p.begin);
    look_up(p.codes + from / 2, values, (to - from) / 2, out);
    if ((to - from) % 2 != 0) out[to - from - 1] = values[p.codes[to / 2] >> 4];
  }
}

// A block: its absmax without NaN, then its codes. `get(i)` is element i of the weight.
template <class Get>
void quantize(const Nf4Quantize& p, int64_t first_block, int64_t last_block, Get get) {
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t from = block * p.block_size, to = std::min(p.count, from + p.block_size);
    float absmax = 0;
    for (int64_t i = from; i < to; ++i) {
      const float size = std::fabs(get(i));
      absmax = size > absmax ? size : absmax;
    }
    p.absmax[block] = absmax;
    const float inverse = 1.0f / std::max(absmax, 1e-38f);
    for (int64_t i = from; i < to; i += 2) {
      const int high = nf4_code(get(i) * inverse);
      const int low = i + 1 < to ? nf4_code(get(i + 1) * inverse) : 7;
      p.codes[i / 2] = static_cast<uint8_t>(high << 4 | low);
    }
  }
}

}  // namespace

void nf4_dequantize_cpu(const Nf4Dequantize& p, int64_t first_block, int64_t last_block) {
  if (p.type == FloatType::kFloat32) {
    return dequantize<float>(p, first_block, last_block, [](float value) { return value; });
  }
  dequantize<uint16_t>(p, first_block, last_block,
                       p.type == FloatType::kBfloat16 ? to_bfloat16 : to_float16);
}

void nf4_quantize_cpu(const Nf4Quantize& p, int64_t first_block, int64_t last_block) {
  const auto* const wide = static_cast<const float*>(p.weight);
  const auto* const half = static_cast<const uint16_t*>(p.weight);
  if (p.type == FloatType::kFloat32) {
    return quantize(p, first_block, last_block, [=](int64_t i) { return wide[i]; });
  }
  if (p.type == FloatType::kBfloat16) {
    return quantize(p, first_block, last_block, [=](int64_t i) { return from_bfloat16(half[i]); });
  }
  quantize(p, first_block, last_block, [=](int64_t i) { return from_float16(half[i]); });
}

void scale_quantize_cpu(const ScaleQuantize& p, int64_t first_block, int64_t last_block) {
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t from = block * p.block_size, to = std::min(p.count, from + p.block_size);
    float absmax = 0;
    for (int64_t i = from; i < to; ++i) {
      const float size = std::fabs(p.values[i]);
      absmax = size > absmax ? size : absmax;
    }
    p.absmax[block] = absmax;
    const float inverse = 1.0f / absmax;
    for (int64_t i = from; i < to; ++i) {
      p.codes[i] = static_cast<uint8_t>(nearest_code(p.code, p.values[i] * inverse));
    }
  }
}

}  // namespace fastlora
