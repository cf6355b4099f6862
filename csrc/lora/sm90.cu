// Launches the kernel of sm90_kernel.cuh: how its work is cut, and which instance to run.
#include <cmath>
#include <map>
#include <mutex>
#include <utility>

#include "common/philox.cuh"
#include "gemm/sm90_launch.cuh"
#include "host/counters.h"
#include "lora/lora.h"
#include "lora/sm90_kernel.cuh"
#include "plan/share.h"

namespace fastlora {
namespace {

using sm90::LoraArgs;
using sm90::LoraDown;
using sm90::LoraMaps;
using sm90::LoraWgrad;

constexpr int64_t kLeastSlots = 4;  // of 128, in a run: shorter ones are all ramp
constexpr int64_t kAnyLength = int64_t{1} << 24;
constexpr int64_t kMostSlots = 32;  // of `wgrad`, whose results may stay fp32; h is rounded anyway

struct Cut {
  int64_t runs, length;
};

// Runs of a sum over `slots`, of which there are `groups`, so that `clusters` of them have as many
// items as one another. Every item has microseconds of its own, so there are no more than that.
// But a sum of tensor cores, which cut what they add, is not longer than `most_slots`.
Cut cut(int64_t slots, int64_t groups, int clusters, int64_t most_slots) {
  const int64_t most = std::max<int64_t>(1, slots / kLeastSlots);
  const int64_t runs =
      std::max(std::clamp<int64_t>(clusters / groups, 1, most), ceil_div(slots, most_slots));
  const int64_t length = ceil_div(slots, runs);
  return {ceil_div(slots, length), length};
}

int ranks_at_a_time(int64_t rank) { return rank <= 16 ? 16 : 64; }

struct Plan {
  LoraArgs args{};
  LoraSizes sizes{};
};

// Counters, and memory for partial sums, by their offset.
struct Room {
  int64_t counters, float4s = 0;

  // The items of `groups` sums of a cluster, by `warps` in each of its CTAs: a counter and, in
  // every lane, `values` each.
  template <class Job>
  int items(Job& job, int64_t slots, const Cut& cut, int64_t groups, int warps, int values) {
    check(groups * cut.runs < (int64_t{1} << 24), "lora_sm90: too much work for one launch");
    job.slots = static_cast<int>(slots);
    job.runs = static_cast<int>(cut.runs);
    job.run_slots = static_cast<int>(cut.length);
    job.first_counter = static_cast<int>(counters);
    job.partial = reinterpret_cast<float4*>(float4s * sizeof(float4));
    const int64_t sums = groups * 2 * warps;
    counters += sums;
    if (cut.runs > 1) float4s += sums * cut.runs * (values / 4) * 32;
    return static_cast<int>(groups * cut.runs);
  }

  // The items that make g and dB of one read: `groups` of rows, `strips` of columns.
  int both(LoraDown& down, LoraWgrad& d_b, int64_t strips, const Cut& cut, int64_t groups,
           bool bias) {
    check(groups * cut.runs < (int64_t{1} << 24), "lora_sm90: too much work for one launch");
    const auto parts = [&](auto& job, int64_t runs, int64_t slabs, int in_lane) {
      job.slots = static_cast<int>(strips);
      job.runs = static_cast<int>(runs);
      job.partial = reinterpret_cast<float4*>(float4s * sizeof(float4));
      float4s += slabs * runs * in_lane * 32;
    };
    parts(down, cut.runs, groups * sm90::kBothRows / 16, 2);
    parts(d_b, 2 * groups, strips * sm90::kSlotDepth / 16, bias ? 3 : 2);
    down.run_slots = static_cast<int>(cut.length);
    return static_cast<int>(groups * cut.runs);
  }
};

// Everything of LoraArgs but the counters and the GEMM's part; partial sums by their offset.
Plan plan_items(const LoraParams& p, const GemmConfig& config) {
  const GemmParams& gemm = p.gemm;
  const int clusters = config.num_sms / 2;
  Plan plan;
  LoraArgs& args = plan.args;
  args.gemm = sm90::make_args(gemm, config);
  const int ranks = ranks_at_a_time(gemm.rank);
  args.rank_blocks = static_cast<int>(ceil_div(gemm.rank, ranks));
  args.flags = static_cast<int>(ceil_div(gemm.m, 128));
  args.columns = p.columns;
  args.keeps_z = p.z != nullptr;
  for (int i = 0; i < 2; ++i) {
    args.casts[i] = {p.casts[i].from, p.casts[i].to, p.casts[i].elements};
    args.cast_items += static_cast<int>(ceil_div(p.casts[i].elements, sm90::kCastElements));
  }

  const bool drops = p.rng_state != nullptr;
  args.both =
      gemm.w_mn_major && p.d_b != nullptr && !drops && ranks == sm90::kBothRanks && p.one_read;
  const int64_t row_groups = args.both ? ceil_div(gemm.m, sm90::kBothRows) : 0;
  const int first_counter = args.flags * (drops ? 2 : 1);

  const int tiles = args.gemm.tiles_m * args.gemm.tiles_n;
  const int64_t read = gemm.m * gemm.k;
  const LinearWork work{clusters,
                        tiles,
                        gemm.k + sm90::kBlockK,
                        ceil_div(args.gemm.tiles_m, args.gemm.group_m),
                        read * args.rank_blocks,
                        p.d_b == nullptr || args.both ? 0 : read,
                        p.d_a == nullptr ? 0 : gemm.m * gemm.n};
  const Share share = p.beside ? share_work(work) : Share{clusters, false, 0};
  args.helpers = share.helpers;

  if (drops) {  // of x: K is n in backward
    const int64_t columns = gemm.w_mn_major ? gemm.n : gemm.k;
    args.gemm.mask = p.words;
    args.gemm.mask_pitch = ceil_div(columns, 32) * 4;
    args.dropout = {p.rng_state,
                    p.rng_stride,
                    p.keep,
                    static_cast<int>(4 - first_call(p.keep)),
                    static_cast<int>(8 * ceil_div(gemm.m, 32)),
                    static_cast<int>(ceil_div(args.gemm.mask_pitch, 32))};
    plan.sizes.words = args.dropout.unit_rows * args.gemm.mask_pitch;
    check(ceil_div(gemm.m, 32) * args.dropout.row_chunks < (int64_t{1} << 30),
          "lora_sm90: too much work for one launch");
  }
  const auto out = [](LoraWgrad& job, int64_t columns, void* data, GradType type,
                      int64_t stride_column, int64_t stride_rank) {
    job.out = data;
    job.type = static_cast<int>(type);
    job.stride_column = stride_column;
    job.stride_rank = stride_rank;
    job.columns = static_cast<int>(columns);
  };
  args.down.out = const_cast<void*>(gemm.h);
  args.down.scale = p.scale;
  args.down.scaling = p.scaling;
  out(args.wgrad[0], gemm.k, p.d_b, p.type_b, gemm.rank, 1);
  out(args.wgrad[1], gemm.n, p.d_a, p.type_a, 1, gemm.n);

  Room room{first_counter + row_groups};
  const int64_t strips = ceil_div(gemm.k, sm90::kSlotDepth);
  const int64_t depth = ceil_div(gemm.m, sm90::kSlotDepth);
  if (args.both) {
    args.down.first_counter = first_counter;
    // All helpers share the first rows, whose g is wanted first.
    args.down_items =
        room.both(args.down, args.wgrad[0], strips, cut(strips, 1, args.helpers, kAnyLength),
                  row_groups, p.d_bias != nullptr);
  } else {
    args.down_items =
        room.items(args.down, strips,
                   cut(strips, args.gemm.tiles_m * args.rank_blocks, args.helpers, kAnyLength),
                   args.gemm.tiles_m * args.rank_blocks, sm90::kConsumerWarps, ranks / 2);
  }
  // Of all the items of a gradient the first `early` of 1 are the helpers'.
  args.limits[0] = args.cast_items + args.down_items;
  args.limits[1] = tiles;
  const auto wgrad = [&](int i, double early) {
    LoraWgrad& job = args.wgrad[i];
    const int64_t groups = ceil_div(job.columns, sm90::kUnitRows) * args.rank_blocks;
    const int items =
        room.items(job, depth, cut(depth, groups, early == 1 ? args.helpers : clusters, kMostSlots),
                   groups, sm90::kConsumerWarps, ranks / 2 + 4);
    const int first = static_cast<int>(std::lround(early * items));
    args.limits[0] += first;
    args.limits[2] += items - first;
    args.wgrad_items[i] = items;
  };
  if (p.d_b != nullptr && !args.both) wgrad(0, share.b_early ? 1 : 0);
  if (p.d_a != nullptr) wgrad(1, share.a_early);
  args.wgrad[0].bias = p.d_bias;
  args.wgrad[0].bias_type = static_cast<int>(p.type_bias);
  args.helpers = std::min(args.helpers, args.limits[0]);

  plan.sizes.counters = static_cast<int64_t>(sizeof(sm90::LoraCounters) / 4) + room.counters;
  plan.sizes.workspace_bytes = room.float4s * static_cast<int64_t>(sizeof(float4));
  return plan;
}

LoraMaps encode_lora_maps(const LoraParams& p, const GemmConfig& config) {
  const GemmParams& gemm = p.gemm;
  const ElementType type = gemm.half ? ElementType::kFloat16 : ElementType::kBfloat16;
  const int ranks = ranks_at_a_time(gemm.rank);
  const Swizzle swizzle = ranks == 16 ? Swizzle::k32 : Swizzle::k128;
  const auto narrow = [&](const void* data, int64_t rows, int64_t pitch) {
    return tensor_map_2d(data, type, rows, gemm.rank, pitch, 64, ranks, swizzle);
  };
  LoraMaps maps;
  maps.gemm = sm90::encode_maps(gemm, config, ranks);
  maps.factor = gemm.w_mn_major
                    ? narrow(p.factor, gemm.k, p.factor_pitch)
                    : tensor_map_2d(p.factor, type, gemm.rank, gemm.k, p.factor_pitch, ranks, 64);
  maps.wide[0] = maps.wide[1] = maps.narrow[0] = maps.narrow[1] = maps.factor;  // not read
  maps.z = maps.gemm.y;
  if (p.z != nullptr) maps.z = tensor_map_2d(p.z, type, gemm.m, gemm.n, gemm.n, 16, 64);
  if (p.d_b != nullptr) {
    maps.wide[0] = tensor_map_2d(gemm.x, type, gemm.m, gemm.k, gemm.x_pitch, 64, 64);
    maps.narrow[0] = narrow(p.h, gemm.m, p.h_pitch);
  }
  if (p.d_a != nullptr) {
    maps.wide[1] = tensor_map_2d(p.x, type, gemm.m, gemm.n, p.x_pitch, 64, 64);
    maps.narrow[1] = narrow(gemm.h, gemm.m, gemm.h_pitch);
  }
  return maps;
}

void check_lora(const LoraParams& p, const GemmConfig& config) {
  const GemmParams& gemm = p.gemm;
  check(gemm.rank >= 8 && gemm.rank <= 512 && gemm.rank % 8 == 0 && gemm.k % 8 == 0,
        "lora_sm90: rank (up to 512) and k must be multiples of 8, got ", gemm.rank, " and ",
        gemm.k);
  // Slots of 48 KiB, and 256 rows for a pair of CTAs.
  const bool wide = config.block_m == 128 && config.block_n == 256 && config.cluster_m == 2;
  const bool high = config.block_m == 256 && config.block_n == 128 && config.cluster_n == 2;
  check(wide || (high && p.rng_state == nullptr), "lora_sm90: no kernel has the tile ",
        config.block_m, "x", config.block_n, " in clusters of ", config.cluster_m, "x",
        config.cluster_n, p.rng_state == nullptr ? "" : " with dropout");
  check(p.rng_state == nullptr || (gemm.rank <= 64 && p.keep <= kKeepAll),
        "lora_sm90: dropout takes ranks up to 64 and keep up to ", kKeepAll);
  check(p.d_bias == nullptr || p.d_b != nullptr, "lora_sm90: d_bias comes with d_b");
  check(gemm.mask == nullptr, "lora_sm90: takes no mask");
  check(gemm.h_pitch == gemm.rank, "lora_sm90: h must have no gaps");
  check(p.counters != nullptr, "lora_sm90: needs counters");
  check(p.columns == nullptr || (!gemm.w_mn_major && p.rng_state == nullptr &&
                                 reinterpret_cast<uintptr_t>(p.columns) % 8 == 0),
        "lora_sm90: factors of columns are for forward without dropout, at a multiple of 8 bytes");
  check(p.z == nullptr || p.columns != nullptr, "lora_sm90: z comes with factors of columns");
  const auto aligned = [](const char* name, const void* data, int64_t pitch) {
    check(reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch % 8 == 0, "lora_sm90: ", name,
          " must start at, and have rows apart by, multiples of 16 bytes");
  };
  aligned("the factor", p.factor, p.factor_pitch);
  if (p.d_a != nullptr) aligned("x", p.x, p.x_pitch);
  if (p.d_b != nullptr) aligned("h", p.h, p.h_pitch);
  for (const auto& cast : p.casts) {
    check(cast.elements % 8 == 0 && reinterpret_cast<uintptr_t>(cast.from) % 16 == 0,
          "lora_sm90: casts must start at multiples of 16 bytes, and have 8 n elements");
  }
}

template <class T, class Tile, int kN, bool kDrop>
void launch(const LoraMaps& maps, const LoraArgs& args, bool backward, const GemmConfig& config,
            CUstream_st* stream) {
  static std::array<std::atomic<int>, 128> known[2]{};
  auto* const kernel = backward ? sm90::lora_kernel<T, Tile, kN, true, kDrop>
                                : sm90::lora_kernel<T, Tile, kN, false, kDrop>;
  sm90::launch_persistent(kernel, sm90::kLoraSharedBytes<Tile>, known[backward],
                          args.limits[0] + args.limits[1] + args.limits[2], config, stream, maps,
                          args);
}

}  // namespace

bool is_capturing(CUstream_st* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void zero_async(void* data, int64_t bytes, CUstream_st* stream) {
  check_cuda(cudaMemsetAsync(data, 0, bytes, stream), "cudaMemsetAsync");
}

struct StreamCounters::Sets {
  std::mutex mutex;
  uint32_t* data[2] = {nullptr, nullptr};
  int64_t capacity = 0;
  int next = 0;
  int64_t used = 0;   // of the other
  bool known = true;  // the last launch was made: it left them as this says
};

StreamCounters::Sets& StreamCounters::of(int device, CUstream_st* stream) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<int, CUstream_st*>, Sets>;  // never destroyed
  const std::lock_guard<std::mutex> lock(mutex);
  return known[{device, stream}];
}

StreamCounters::StreamCounters(int device, CUstream_st* stream, int64_t count)
    : sets_(of(device, stream)), count_(count), lock_(sets_.mutex) {
  const bool fit = sets_.known && sets_.capacity >= count;
  sets_.known = false;  // until it is launched
  if (fit) return;
  sets_.capacity = 0;
  if (void* const before = std::exchange(sets_.data[0], nullptr); before != nullptr) {
    check_cuda(cudaFreeAsync(before, stream), "cudaFreeAsync");
  }
  const int64_t capacity = std::max<int64_t>(8192, 2 * count);
  void* data = nullptr;
  check_cuda(cudaMallocAsync(&data, 2 * capacity * 4, stream), "cudaMallocAsync");
  sets_.data[0] = static_cast<uint32_t*>(data);
  sets_.data[1] = sets_.data[0] + capacity;
  zero_async(data, 2 * capacity * 4, stream);
  sets_.capacity = capacity;
  sets_.used = 0;
}

uint32_t* StreamCounters::zeros() const { return sets_.data[sets_.next]; }
uint32_t* StreamCounters::used() const { return sets_.data[1 - sets_.next]; }
int64_t StreamCounters::used_count() const { return sets_.used; }
void StreamCounters::launched() {
  sets_.known = true;
  sets_.used = count_;
  sets_.next = 1 - sets_.next;
}

LoraSizes lora_sm90_sizes(const LoraParams& params, const GemmConfig& config) {
  return plan_items(params, config).sizes;
}

void lora_sm90(const LoraParams& params, const GemmConfig& config, CUstream_st* stream) {
  sm90::check_gemm(params.gemm, config);
  check_lora(params, config);
  LoraArgs args = plan_items(params, config).args;
  args.counters = reinterpret_cast<sm90::LoraCounters*>(params.counters);
  args.used = params.used;
  args.used_count = params.used_count;
  const auto place = [&](float4*& partial) {
    partial = reinterpret_cast<float4*>(static_cast<char*>(params.workspace) +
                                        reinterpret_cast<intptr_t>(partial));
  };
  place(args.down.partial);
  for (LoraWgrad& job : args.wgrad) place(job.partial);
  const LoraMaps maps = encode_lora_maps(params, config);
  const auto run = [&](auto instance) {
    instance(maps, args, params.gemm.w_mn_major, config, stream);
  };
  const bool narrow = ranks_at_a_time(params.gemm.rank) == 16;
  const bool drops = params.rng_state != nullptr;
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    using Wide = sm90::Tile<128, 256>;
    using High = sm90::Tile<256, 128>;
    if (drops) return run(narrow ? launch<T, Wide, 16, true> : launch<T, Wide, 64, true>);
    if (config.block_m == 128) {
      return run(narrow ? launch<T, Wide, 16, false> : launch<T, Wide, 64, false>);
    }
    run(narrow ? launch<T, High, 16, false> : launch<T, High, 64, false>);
  };
  if (params.gemm.half) return of_type(__half{});
  of_type(__nv_bfloat16{});
}

}  // namespace fastlora
