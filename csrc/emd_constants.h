// What the EMD's kernels and their tests share without needing PyTorch.
#pragma once

#include <cstdint>

namespace pointcmt::emd {

// Columns of the statistics that the operator returns beside distance and assignment, int64 [B, 4].
enum Statistic : int64_t {
  kRounds = 0,     // rounds of bidding; on the CPU, where points bid one by one, bids / N rounded up
  kBids = 1,       // bids made
  kCompleted = 2,  // points still unmatched when the bound on rounds was met, then matched to what was free
  kBoundMet = 3,   // 1 where the bound ended the auction before its last phase was through
  kStatistics = 4,
};

// eps scaling: the first bid increment (of the clouds' scale) and the factor between phases.
constexpr float kFirstEps = 0.1f;
constexpr float kEpsFactor = 4.0f;
// A phase before the last ends when at most N / kUnmatchedFraction points are unmatched.
constexpr int kUnmatchedFraction = 128;
// A warm start begins with the finest phase that finds at most N / kWarmFraction points of it ill matched;
// where none does, the start is no better than none.
constexpr int kWarmFraction = 16;
// Clouds this far apart for their size have their distance, times this, as scale: float32 resolves no more.
constexpr double kLeastScale = 1e-4;

}  // namespace pointcmt::emd
