// Launches sm90_kernel.cuh: checks, how k is cut, and which instance to run.
#include <algorithm>
#include <limits>

#include "common/index.cuh"
#include "down/down.h"
#include "down/sm90_kernel.cuh"
#include "host/check.h"
#include "host/dependent_launch.cuh"

// Rank blocks that there are kernels for. A build of a subset helps while tuning.
#ifndef FASTLORA_DOWN_RANKS
#define FASTLORA_DOWN_RANKS(each) each(16) each(32) each(64) each(128)
#endif

namespace fastlora {
namespace {

using sm90::DownArgs;
using sm90::LSource;

bool aligned(const void* data, int64_t pitch, int64_t size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch * size % 16 == 0;
}

void check_all(const DownParams& p, const DownConfig& c) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;
  check(p.m >= 1 && p.m <= kMost && p.k >= 1 && p.k <= kMost,
        "down_sm90: sizes must be in 1..2^31-1025, got ", p.m, " and ", p.k);
  check(p.rank >= 1 && p.rank <= 4096, "down_sm90: rank must be in 1..4096, got ", p.rank);
  check(
      p.x != nullptr && aligned(p.x, p.x_pitch, 2) && p.x_pitch >= p.k,
      "down_sm90: x needs an address that is a multiple of 16 and a pitch that is a multiple of 8");
  check(p.l != nullptr && p.out != nullptr && p.out_pitch >= p.rank && p.out_pitch <= 8192,
        "down_sm90: l and out must be given, and out's pitch be at least ", p.rank);
  check(p.l_stride_rank >= 0 && p.l_stride_k >= 0, "down_sm90: strides of l must not be negative");
  check(p.words == nullptr || (p.rng_state != nullptr && p.emit_cols >= 1),
        "down_sm90: mask words need a state and a width");
  check(p.keep <= kKeepAll, "down_sm90: keep must be at most ", kKeepAll, ", got ", p.keep);
  check(p.cast == nullptr || (p.cast_out != nullptr && aligned(p.cast_out, p.cast_out_pitch, 2) &&
                              p.cast_out_pitch >= p.cast_cols),
        "down_sm90: the matrix to cast needs a place aligned like x");
  check(c.stages == 0 || (c.stages >= 2 && c.stages <= sm90::kMostCopyStages),
        "down_sm90: stages must be 2..", sm90::kMostCopyStages, ", got ", c.stages);
  check(c.splits >= 0 && c.splits <= 32, "down_sm90: splits must be at most 32, got ", c.splits);
}

bool drops(const DownParams& p) { return p.rng_state != nullptr && p.words == nullptr; }
bool has_side_job(const DownParams& p) { return p.words != nullptr || p.cast != nullptr; }

// Chunks of 8 ranks rather than of 8 k.
bool r_major(const DownParams& p) { return p.l_stride_rank == 1 && p.l_stride_k != 1; }

LSource source_of_l(const DownParams& p) {
  const bool rows = p.l_stride_rank == 1 || p.l_stride_k == 1;
  const int64_t pitch = r_major(p) ? p.l_stride_k : p.l_stride_rank;
  const bool vector = rows && aligned(p.l, pitch, p.l_float ? 4 : 2);
  if (p.l_float) return vector ? LSource::kFloatVector : LSource::kFloat;
  return vector ? LSource::kCopy : LSource::kShort;
}

// ---- The plan -----------------------------------------------------------------------------------

struct Plan {
  int rank_block, rank_blocks, splits, stages, steps, shared_bytes;
  int64_t row_blocks;

  int pitch() const { return rank_block * rank_blocks; }  // of partial sums
  int64_t workspace(int64_t m) const { return splits > 1 ? 4 * splits * m * pitch() : 0; }
};

Plan make_plan(const DownParams& p, const DownConfig& c) {
  constexpr int kMostShared = 232448, kOfSm = 233472, kReserved = 1024;
  const int sms = current_multiprocessors();
  Plan plan{};
  plan.rank_block = c.rank_block;
  if (c.rank_block == 0) {
    plan.rank_block = p.rank <= 16 ? 16 : p.rank <= 32 ? 32 : p.rank <= 64 ? 64 : 128;
  }
  plan.rank_blocks = static_cast<int>(ceil_div(p.rank, plan.rank_block));
  plan.row_blocks = ceil_div(p.m, sm90::kDownM);
  plan.steps = static_cast<int>(ceil_div(p.k, sm90::kDownK));
  const int64_t tiles = plan.row_blocks * plan.rank_blocks;

  // A run shorter than four steps is not worth a second launch.
  plan.splits = c.splits;
  if (c.splits == 0) {
    plan.splits =
        static_cast<int>(std::min({int64_t{sms} / tiles, int64_t{plan.steps / 4}, int64_t{32}}));
  }
  plan.splits = std::max(1, std::min(plan.splits, plan.steps));

  // Five stages keep enough bytes on their way with one CTA an SM; with more CTAs than SMs two have
  // to fit, unless their rings would be too short, or their registers too many (256 threads).
  const int words = drops(p) ? 2 * sm90::kDownWordBytes : 0;
  const int stage = sm90::down_stage_bytes(plan.rank_block);
  const int alone = (kMostShared - words) / stage;
  const int beside = (kOfSm / 2 - kReserved - words) / stage;
  plan.stages = c.stages;
  if (c.stages == 0) {
    const bool fit = beside >= 3 && !(has_side_job(p) && plan.rank_block >= 64);
    const bool crowded = tiles * plan.splits > sms && fit;
    plan.stages = std::min(5, crowded ? beside : alone);
  }
  plan.stages = std::min(plan.stages, alone);
  plan.shared_bytes = plan.stages * stage + words;
  return plan;
}

DownArgs make_args(const DownParams& p, const DownConfig& c, const Plan& plan) {
  DownArgs args{};
  args.x = p.x;
  args.x_pitch = p.x_pitch * 2;
  args.l = p.l;
  args.l_stride_rank = p.l_stride_rank;
  args.l_stride_k = p.l_stride_k;
  args.l_source = source_of_l(p);
  args.out = p.out;
  args.out_pitch = p.out_pitch;
  args.out_pairs = p.out_pitch % 2 == 0 && reinterpret_cast<uintptr_t>(p.out) % 4 == 0;
  args.scale = p.scale;
  args.scaling = p.scaling;
  args.partial = plan.splits > 1 ? static_cast<float*>(p.workspace) : nullptr;
  args.m = static_cast<int>(p.m);
  args.k = static_cast<int>(p.k);
  args.rank = static_cast<int>(p.rank);
  args.steps = plan.steps;
  args.stages = plan.stages;
  args.rng_state = p.rng_state;
  args.rng_stride = p.rng_stride;
  args.keep = p.keep;
  args.calls = 4 - static_cast<int>(first_call(p.keep & (kKeepAll - 1)));
  args.words = p.words;
  args.words_pitch = ceil_div(p.emit_cols, 8);
  args.cast = p.cast_rows > 0 && p.cast_out_pitch > 0 ? p.cast : nullptr;
  args.cast_rows = p.cast_rows;
  args.cast_cols = p.cast_cols;
  args.cast_pitch = p.cast_pitch;
  args.cast_out = p.cast_out;
  args.cast_out_pitch = p.cast_out_pitch;
  args.wait = c.wait;
  return args;
}

template <class T, int kN, bool kRMajor>
void launch(bool drop, const DependentLaunch& how, const DownArgs& args) {
  launch_dependent(
      drop ? sm90::down_kernel<T, kN, kRMajor, true> : sm90::down_kernel<T, kN, kRMajor, false>,
      how, args);
}

template <class T>
void launch(const DownParams& p, const Plan& plan, DependentLaunch how, const DownArgs& args) {
  const bool r = r_major(p), drop = drops(p);
  switch (plan.rank_block) {
#define FASTLORA_EACH(n)                                                            \
  case n:                                                                           \
    r ? launch<T, n, true>(drop, how, args) : launch<T, n, false>(drop, how, args); \
    break;
    FASTLORA_DOWN_RANKS(FASTLORA_EACH)
#undef FASTLORA_EACH
    default:
      check(false, "down_sm90: no kernel has the rank block ", plan.rank_block);
  }
  if (plan.splits == 1) return;
  how.grid = dim3(static_cast<uint32_t>(ceil_div(p.m * ceil_div(p.out_pitch, 2), 256)));
  how.threads = 256;
  how.shared_bytes = 0;
  launch_dependent(sm90::down_sum_kernel<T>, how, args, plan.splits, plan.pitch());
}

}  // namespace

int64_t down_sm90_workspace(const DownParams& params, const DownConfig& config) {
  return make_plan(params, config).workspace(params.m);
}

void down_sm90(const DownParams& params, const DownConfig& config, CUstream_st* stream) {
  check_all(params, config);
  const Plan plan = make_plan(params, config);
  const int64_t workspace = plan.workspace(params.m);
  check(workspace == 0 || (params.workspace != nullptr && params.workspace_bytes >= workspace &&
                           reinterpret_cast<uintptr_t>(params.workspace) % 16 == 0),
        "down_sm90: needs a workspace of ", workspace, " bytes, got ", params.workspace_bytes);
  DependentLaunch how;
  how.grid = dim3(static_cast<uint32_t>(plan.row_blocks), plan.rank_blocks, plan.splits);
  how.threads = sm90::kDownThreads + (has_side_job(params) ? sm90::kDownSideThreads : 0);
  how.shared_bytes = plan.shared_bytes;
  how.dependent = config.wait;
  how.stream = stream;
  const DownArgs args = make_args(params, config, plan);
  if (params.half) return launch<__half>(params, plan, how, args);
  launch<__nv_bfloat16>(params, plan, how, args);
}

}  // namespace fastlora
