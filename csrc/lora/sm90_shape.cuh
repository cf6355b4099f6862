// What the two halves of the low-rank linear (sm90_kernel.cuh) agree on: its items, and the order
// in which clusters of two CTAs claim them.
//
//   early   casts of fp32 factors, then `down` from the first rows on (backward with few ranks dB
//           comes of the same read, sm90_both.cuh), then what `wgrad` there is time for: the first
//           `helpers` clusters to start do these before anything else
//   tiles   of y: all other clusters begin with these
//   late    the rest of `wgrad`, when no tiles are left
//
// Tiles are long, so that not all clusters get as many of them: `helpers` are as many as would be
// idle at the end. An item waits only for early items, and those are done by clusters that run and
// wait for nothing else: it does not matter how many run at once.
#pragma once

#include "gemm/sm90_shape.cuh"

namespace fastlora::sm90 {

constexpr int kUnitRows = 256;   // rows of an item of `down`, columns of one of `wgrad`: 128 a CTA
constexpr int kBothRows = 1024;  // of an item that makes g and dB of one read of dY
constexpr int kSlotDepth = 128;  // of the sum in a slot of the ring: two pieces of 64
constexpr int kPieceBytes = 16384;    // of 128 rows or columns, 64 deep
constexpr int kNarrowOffset = 32768;  // of the other operand in the slot
constexpr int kNarrowBytes = 8192;    // a piece of it, at most 64 ranks
constexpr int kCastElements = 8192;   // of an item: 512 a warp

// All zero before a launch.
struct LoraCounters {
  uint32_t arrived;  // clusters that have started
  uint32_t next[3];  // claimed of early items, of tiles beyond those of the arrivals, of late items
  uint32_t cast;     // warps that have cast their share
  uint32_t rows;     // warps that have written their rows of `down`, all together
  uint32_t words;    // chunks of the mask claimed
  uint32_t parts;    // if dB is made with g: CTAs whose parts are written, over all items
  uint32_t sums;     // and sums claimed
  // `rows` for each 128 of them; then, with dropout, the chunks of their mask that are made; then,
  // if dB is made with g, `parts` for each 1024 rows; then, of other sums, their parts.
  uint32_t flags[];
};

struct LoraMaps {
  GemmMaps gemm;
  CUtensorMap factor;     // of `down`: 64 of k x ranks
  CUtensorMap wide[2];    // of `wgrad`, dY and x: boxes of 64 rows x 64 columns
  CUtensorMap narrow[2];  // h and g: 64 rows x ranks
  CUtensorMap z;          // as gemm.y
};

struct LoraCast {
  const float* from;
  void* to;
  int64_t elements;
};

struct LoraDown {
  void* out;  // [m, rank]
  float scale;
  const float* scaling;
  int runs, run_slots, slots;
  float4* partial;
  int first_counter;
};

// dB = dY^T h, then dA = g^T x. If dB is made with g, it has `runs` parts of `slots` x 128 columns.
struct LoraWgrad {
  void* out;
  void* bias;                          // sums over rows, or null
  int64_t stride_column, stride_rank;  // of out
  int columns;
  int type, bias_type;  // GradType
  int runs, run_slots, slots;
  float4* partial;
  int first_counter;
};

// The mask of x: gemm.mask are its words, [8 ceil(m / 32), gemm.mask_pitch].
struct LoraDropout {
  const int64_t* rng_state;
  int64_t rng_stride;
  uint32_t keep;
  int calls;       // of Philox a word
  int unit_rows;   // of words
  int row_chunks;  // 32 words wide, of 32 rows
};

struct LoraArgs {
  GemmArgs gemm;
  LoraCounters* counters;
  uint32_t* used;
  int64_t used_count;
  LoraDropout dropout;
  const float* columns;  // factors of y's columns, or null
  bool keeps_z;          // stores what they multiply
  int rank_blocks;
  int flags;
  bool both;  // g and dB are made of one read of dY
  LoraCast casts[2];
  LoraDown down;
  LoraWgrad wgrad[2];
  int cast_items, down_items, wgrad_items[2];
  int helpers;
  int limits[3];  // items that are early, tiles, late
};

enum class Job { kEnd = -1, kCast, kDown, kTile, kWgrad };

// As it travels through shared memory: 16 bytes.
struct Item {
  Job job;
  int at;    // first row (`down`, tiles) or column (`wgrad`) of the cluster; number of a cast
  int next;  // first column of a tile; run of a sum
  int rank_block, product;  // of a sum
};

// Items are numbered early, late, tiles. Every division of it takes a thread a tenth of a
// microsecond: one thread does it for all.
template <class Tile>
__device__ __forceinline__ Item decode(const LoraArgs& args, int item) {
  if (item < 0) return {Job::kEnd, 0, 0, 0, 0};
  if (item < args.cast_items) return {Job::kCast, item, 0, 0, 0};
  item -= args.cast_items;
  if (item < args.down_items) {
    const int block = item / args.down.runs;
    const int rows = args.both ? kBothRows : kUnitRows;
    return {Job::kDown, block / args.rank_blocks * rows, item % args.down.runs,
            block % args.rank_blocks, 0};
  }
  item -= args.down_items;
#pragma unroll
  for (int product = 0; product < 2; ++product) {
    if (item < args.wgrad_items[product]) {  // all columns of one run of rows after one another
      const int runs = args.wgrad[product].runs;
      const int blocks = args.wgrad_items[product] / runs;
      const int block = item % blocks;
      // dB from the last rows on, which the tiles have just read.
      const int run = product == 0 ? runs - 1 - item / blocks : item / blocks;
      return {Job::kWgrad, block / args.rank_blocks * kUnitRows, run, block % args.rank_blocks,
              product};
    }
    item -= args.wgrad_items[product];
  }
  int row, col;
  locate<Tile>(args.gemm, item, 0, row, col);
  return {Job::kTile, row, col, 0, 0};
}

// Slots of a run, and the first of them.
template <class Sum>
__device__ __forceinline__ int slots_of(const Sum& sum, int run, int& first) {
  first = run * sum.run_slots;
  return min(sum.run_slots, sum.slots - first);
}

}  // namespace fastlora::sm90
