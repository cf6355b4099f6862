// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; seven rounds
// are the fewest that pass BigCrush) and the dropout mask built on it: one place, so that every
// kernel draws the same mask.
//
// A mask element is a pure function of (seed, offset, row, column) and of nothing else: not of the
// tile, the grid or the device:
//   key = seed, low word first          counter = (offset low, offset high, c = column / 8, row)
//   output w decides two columns with 15-bit numbers: its low half column 8 c + 2 w, its high half
//   column 8 c + 2 w + 1; a column is kept when its number is below `keep` (0..32768)
// Masks are held 32 columns to a word, bit b of word a for column 32 a + b: four calls a word.
#pragma once

#include "common/index.cuh"

namespace fastlora {

struct Philox4 {
  uint32_t word[4];
};

constexpr uint32_t kKeepAll = 32768;

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

// Bit i of the low half to bit 2 i, bit i of the high half to bit 2 i + 1.
FASTLORA_HOST_DEVICE uint32_t interleave(uint32_t bits) {
  const auto swap = [&bits](uint32_t mask, int shift) {
    const uint32_t moved = (bits ^ (bits >> shift)) & mask;
    bits ^= moved ^ (moved << shift);
  };
  swap(0x0000FF00, 8);
  swap(0x00F000F0, 4);
  swap(0x0C0C0C0C, 2);
  swap(0x22222222, 1);
  return bits;
}

// The 32 keep bits of one word of one row.
FASTLORA_HOST_DEVICE uint32_t keep_bits(uint64_t seed, uint64_t offset, uint32_t row, uint32_t word,
                                        uint32_t keep) {
  // Adding kKeepAll - keep to a 15-bit number carries into bit 15 exactly when it reaches keep: one
  // addition compares both halves of an output. Sixteen of them shift the low halves' bits to 0..15
  // and the high halves' to 16..31, in order; neighbouring columns are the two halves of an output,
  // so a perfect shuffle of the word brings the bits to their columns.
  const uint32_t bump = (kKeepAll - keep) * 0x10001;
  uint32_t bits = 0;
  for (uint32_t call = 0; call < 4; ++call) {
    const Philox4 random =
        philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                   {{static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32),
                     4 * word + call, row}});
    for (int i = 0; i < 4; ++i) {
      const uint32_t dropped = ((random.word[i] & 0x7FFF7FFF) + bump) & 0x80008000;
      bits = (bits >> 1) | (dropped ^ 0x80008000);
    }
  }
  return interleave(bits);
}

}  // namespace fastlora
