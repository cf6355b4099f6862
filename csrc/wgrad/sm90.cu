// Launches sm90_kernel.cuh: checks, how m is cut, and which instance to run.
#include <algorithm>
#include <limits>

#include "common/index.cuh"
#include "host/check.h"
#include "host/dependent_launch.cuh"
#include "wgrad/sm90_kernel.cuh"
#include "wgrad/wgrad.h"

// Rank blocks that there are kernels for. A build of a subset helps while tuning.
#ifndef FASTLORA_WGRAD_RANKS
#define FASTLORA_WGRAD_RANKS(each) each(16) each(32) each(64) each(128)
#endif

namespace fastlora {
namespace {

using sm90::WgradArgs;
using sm90::WgradProduct;
using sm90::WgradSums;

void check_matrix(const char* name, const void* data, int64_t pitch, int64_t columns) {
  check(data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch % 8 == 0 &&
            pitch >= columns,
        "wgrad_sm90: ", name, " needs an address that is a multiple of 16 and a pitch that is a ",
        "multiple of 8 and at least ", columns);
}

void check_all(const WgradParams& p, const WgradConfig& c) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;
  check(p.m >= 1 && p.m <= kMost && p.rank >= 1 && p.rank <= 4096,
        "wgrad_sm90: m must be in 1..2^31-1025 and rank in 1..4096, got ", p.m, " and ", p.rank);
  check(p.d_a != nullptr || p.d_b != nullptr, "wgrad_sm90: nothing to compute");
  check(p.d_bias == nullptr || p.d_b != nullptr, "wgrad_sm90: d_bias rides on d_b");
  if (p.d_a != nullptr) {
    check(p.k >= 1 && p.k <= kMost, "wgrad_sm90: k must be in 1..2^31-1025, got ", p.k);
    check_matrix("x", p.x, p.x_pitch, p.k);
    check_matrix("g", p.g, p.g_pitch, p.rank);
  }
  if (p.d_b != nullptr) {
    check(p.n >= 1 && p.n <= kMost, "wgrad_sm90: n must be in 1..2^31-1025, got ", p.n);
    check_matrix("dy", p.dy, p.dy_pitch, p.n);
    check_matrix("h", p.h, p.h_pitch, p.rank);
  }
  check(c.stages == 0 || (c.stages >= 2 && c.stages <= sm90::kMostCopyStages),
        "wgrad_sm90: stages must be 2..", sm90::kMostCopyStages, ", got ", c.stages);
  check(c.splits >= 0 && c.splits <= 32, "wgrad_sm90: splits must be at most 32, got ", c.splits);
}

// ---- The plan -----------------------------------------------------------------------------------

struct Plan {
  int rank_block, rank_blocks, splits, stages, steps, shared_bytes;
  int64_t blocks_first, blocks;          // of columns: of the first product, of both
  int64_t count_a, count_b, count_bias;  // elements of the results

  // Floats between the partial sums of two splits: all of them stay aligned to 16 bytes.
  static int64_t split(int64_t count) { return ceil_div(count, 4) * 4; }
  int64_t workspace() const {
    return splits > 1 ? 4 * splits * (split(count_a) + split(count_b) + split(count_bias)) : 0;
  }
};

Plan make_plan(const WgradParams& p, const WgradConfig& c) {
  constexpr int kMostShared = 232448;
  const int sms = current_multiprocessors();
  Plan plan{};
  plan.count_a = p.d_a != nullptr ? p.k * p.rank : 0;
  plan.count_b = p.d_b != nullptr ? p.n * p.rank : 0;
  plan.count_bias = p.d_bias != nullptr ? p.n : 0;
  plan.rank_block = p.rank <= 16 ? 16 : p.rank <= 32 ? 32 : p.rank <= 64 ? 64 : 128;
  plan.rank_blocks = static_cast<int>(ceil_div(p.rank, plan.rank_block));
  plan.blocks_first = p.d_a != nullptr ? ceil_div(p.k, sm90::kWgradColumns) : 0;
  plan.blocks = plan.blocks_first + (p.d_b != nullptr ? ceil_div(p.n, sm90::kWgradColumns) : 0);
  plan.steps = static_cast<int>(ceil_div(p.m, sm90::kWgradRows));
  const int64_t tiles = plan.blocks * plan.rank_blocks;

  // Nine tenths of the SMs saturate memory, so that few blocks more are not worth a second launch.
  // Neither are runs shorter than two steps. Tensor cores cut what they add: no sums of more than
  // 4096 rows, as long as there are splits.
  plan.splits = c.splits;
  if (c.splits == 0) {
    const int64_t wanted = std::max(ceil_div(sms * 9 / 10, tiles), ceil_div(plan.steps, 64));
    plan.splits = static_cast<int>(std::min({wanted, int64_t{plan.steps / 2}, int64_t{32}}));
  }
  plan.splits = std::max(1, std::min(plan.splits, plan.steps));

  // One CTA an SM needs a longer ring than several.
  const int stage = sm90::kWgradVBytes + plan.rank_block * sm90::kWgradRows * 2 +
                    (p.words != nullptr ? sm90::kWgradWordBytes : 0);
  plan.stages = c.stages;
  if (c.stages == 0) plan.stages = tiles * plan.splits <= sms ? 8 : 4;
  plan.stages = std::min(plan.stages, (kMostShared - sm90::kWgradOnesBytes) / stage);
  plan.shared_bytes = plan.stages * stage + sm90::kWgradOnesBytes;
  return plan;
}

bool allows_pairs(const void* out, int64_t rank) {
  return rank % 2 == 0 && reinterpret_cast<uintptr_t>(out) % 8 == 0;
}

WgradArgs make_args(const WgradParams& p, const WgradConfig& c, const Plan& plan) {
  WgradArgs args{};
  WgradProduct& a = args.product[0];
  if (p.d_a != nullptr) {
    a.v = p.x;
    a.v_pitch = p.x_pitch * 2;
    a.u = p.g;
    a.u_pitch = p.g_pitch * 2;
    a.columns = static_cast<int>(p.k);
    a.out = p.d_a;
    a.stride_column = 1;
    a.stride_rank = p.k;
    a.type = static_cast<int>(p.type_a);
  }
  WgradProduct& b = args.product[1];
  if (p.d_b != nullptr) {
    b.v = p.dy;
    b.v_pitch = p.dy_pitch * 2;
    b.u = p.h;
    b.u_pitch = p.h_pitch * 2;
    b.columns = static_cast<int>(p.n);
    b.out = p.d_b;
    b.stride_column = p.rank;
    b.stride_rank = 1;
    b.type = static_cast<int>(p.type_b);
  }
  args.blocks_first = static_cast<int>(plan.blocks_first);
  args.bias = p.d_bias;
  args.bias_type = static_cast<int>(p.type_bias);
  args.words = p.d_a != nullptr ? p.words : nullptr;
  args.words_pitch = ceil_div(p.k, 8);
  args.m = static_cast<int>(p.m);
  args.rank = static_cast<int>(p.rank);
  args.steps = plan.steps;
  args.stages = plan.stages;
  args.wait = c.wait;
  if (plan.splits > 1) {  // the results go to the workspace first, in their own layouts
    auto* const partial = static_cast<float*>(p.workspace);
    a.split = Plan::split(plan.count_a);
    b.split = Plan::split(plan.count_b);
    args.bias_split = Plan::split(plan.count_bias);
    a.out = partial;
    b.out = partial + plan.splits * a.split;
    a.type = b.type = args.bias_type = static_cast<int>(GradType::kFloat32);
    if (args.bias != nullptr) args.bias = partial + plan.splits * (a.split + b.split);
  }
  b.pairs = allows_pairs(b.out, p.rank);
  return args;
}

WgradSums make_sums(const WgradParams& p, const WgradConfig& c, const Plan& plan,
                    const WgradArgs& args) {
  WgradSums sums{};
  const auto partial = [](const void* data) { return static_cast<const float*>(data); };
  sums.sum[0] = {partial(args.product[0].out), p.d_a, plan.count_a, args.product[0].split,
                 static_cast<int>(p.type_a)};
  sums.sum[1] = {partial(args.product[1].out), p.d_b, plan.count_b, args.product[1].split,
                 static_cast<int>(p.type_b)};
  sums.sum[2] = {partial(args.bias), p.d_bias, plan.count_bias, args.bias_split,
                 static_cast<int>(p.type_bias)};
  sums.splits = plan.splits;
  sums.wait = c.wait;
  return sums;
}

template <class T>
void launch(const Plan& plan, const DependentLaunch& how, const WgradArgs& args) {
  switch (plan.rank_block) {
#define FASTLORA_EACH(n) \
  case n:                \
    return launch_dependent(sm90::wgrad_kernel<T, n>, how, args);
    FASTLORA_WGRAD_RANKS(FASTLORA_EACH)
#undef FASTLORA_EACH
    default:
      check(false, "wgrad_sm90: no kernel has the rank block ", plan.rank_block);
  }
}

}  // namespace

int64_t wgrad_sm90_workspace(const WgradParams& params, const WgradConfig& config) {
  return make_plan(params, config).workspace();
}

void wgrad_sm90(const WgradParams& params, const WgradConfig& config, CUstream_st* stream) {
  check_all(params, config);
  const Plan plan = make_plan(params, config);
  const int64_t workspace = plan.workspace();
  check(workspace == 0 || (params.workspace != nullptr && params.workspace_bytes >= workspace &&
                           reinterpret_cast<uintptr_t>(params.workspace) % 16 == 0),
        "wgrad_sm90: needs a workspace of ", workspace, " bytes, got ", params.workspace_bytes);
  DependentLaunch how;
  how.grid = dim3(static_cast<uint32_t>(plan.blocks), plan.rank_blocks, plan.splits);
  how.threads = sm90::kWgradThreads;
  how.shared_bytes = plan.shared_bytes;
  how.dependent = config.wait;
  how.stream = stream;
  const WgradArgs args = make_args(params, config, plan);
  params.half ? launch<__half>(plan, how, args) : launch<__nv_bfloat16>(plan, how, args);
  if (plan.splits == 1) return;
  how.grid =
      dim3(static_cast<uint32_t>(ceil_div(plan.count_a + plan.count_b + plan.count_bias, 256)));
  how.threads = 256;
  how.shared_bytes = 0;
  launch_dependent(sm90::wgrad_sum_kernel, how, make_sums(params, config, plan, args));
}

}  // namespace fastlora
