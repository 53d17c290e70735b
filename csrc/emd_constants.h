// What the EMD's kernels and their tests share without needing PyTorch.
#pragma once

#include <cstdint>

namespace pointcmt::emd {

// Columns of the statistics that the operator returns beside distance, bound and assignment, int64 [B, 5].
enum Statistic : int64_t {
  kRounds = 0,     // the work in units of N rows of N distances, rounded up
  kRows = 1,       // rows of N distances looked through: by bids, sweeps and certificates
  kCompleted = 2,  // points still unmatched when the bound on rounds was met, then matched to what was free
  kBoundMet = 3,   // 1 where the bound ended the auction before the certificate held
  kSweeps = 4,     // sweeps of shortest augmenting paths
  kStatistics = 5,
};

// eps scaling: the first bid increment, as a part of the points' mean distance from their cloud's centre, and
// the factor between phases.
constexpr double kFirstEps = 0.25;
constexpr double kEpsFactor = 4;
// The least first increment, in the clouds' size, for clouds that are points.
constexpr double kLeastEps = 1e-7;
// A phase before the last ends when at most N / kUnmatchedFraction points are unmatched.
constexpr int kUnmatchedFraction = 128;
// The increment at which a certificate is expected to hold, as a multiple of tolerance * mean distance.
constexpr double kTightness = 3;
// After so many bids per point without an end of the phase there is a sweep of shortest augmenting paths: before the
// first one, and between later ones.
constexpr int64_t kBidsFirst = 4, kBidsLater = 2;
// A certificate that did not hold is tried again at this part of the increment that would have been enough.
constexpr double kCaution = 0.7;
// So many points are looked at to see whether the clouds are nearly the same.
constexpr int kSample = 32;
// Increments below this part of the mean price are lost in its rounding: float32 and float64.
constexpr double kFloorFloat = 1.0 / (1 << 21), kFloorDouble = 1.0 / (int64_t{1} << 50);

}  // namespace pointcmt::emd
