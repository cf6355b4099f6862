// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; seven rounds
// are the fewest that pass BigCrush) and the dropout mask built on it: one place, so that every
// kernel draws the same mask.
//
// A mask element is a pure function of (seed, offset, row, column) and of nothing else: not of the
// tile, the grid or the device. 32 columns of a row make one word, bit b for column 32 a + b of
// word a, from four Philox calls c = 0..3:
//   key = seed, low word first          counter = (offset low, offset high, 4 a + c, row)
//   output w decides two columns with 15-bit numbers: its low half column 4 c + w, its high half
//   column 16 + 4 c + w; a column is kept when its number is below `keep` (0..32768)
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

// The 32 keep bits of one word of one row.
FASTLORA_HOST_DEVICE uint32_t keep_bits(uint64_t seed, uint64_t offset, uint32_t row, uint32_t word,
                                        uint32_t keep) {
  // Adding kKeepAll - keep to a 15-bit number carries into bit 15 exactly when it reaches keep: one
  // addition compares both halves of an output. Sixteen of them shift the low halves' bits to 0..15
  // and the high halves' to 16..31, in order.
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
  return bits;
}

}  // namespace fastlora
