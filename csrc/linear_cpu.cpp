// x @ weight.T for few rows of x, on the CPU.
//
// A round of speculative decoding multiplies every weight matrix with 2 to 8 rows. General matrix products pack the weights
// first, which for so few rows costs more than the product; here each weight is read once, where it lies, and used for all
// rows while it is in a register.

#include <algorithm>
#include <cstring>

#include "hedgespec.h"

namespace hedgespec {
namespace {

constexpr std::int64_t lanes = 8;
using Lanes = float __attribute__((vector_size(lanes * sizeof(float))));

HEDGESPEC_INLINE Lanes load(const float* from) {
  Lanes value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// out[m, n] for `Rows` rows of x and `Columns` rows of weight: as many accumulators as registers hold.
template <int Rows, int Columns>
HEDGESPEC_INLINE void tile(const LinearParams& p, std::int64_t row, std::int64_t column) {
  const float* const x = p.x + row * p.x_stride;
  const float* const weight = p.weight + column * p.inner;
  Lanes sums[Columns][Rows] = {};
  const std::int64_t whole = p.inner / lanes * lanes;
  for (std::int64_t k = 0; k < whole; k += lanes) {
    Lanes weights[Columns];
    for (int n = 0; n < Columns; ++n) weights[n] = load(weight + n * p.inner + k);
    for (int m = 0; m < Rows; ++m) {
      const Lanes value = load(x + m * p.x_stride + k);
      for (int n = 0; n < Columns; ++n) sums[n][m] += weights[n] * value;
    }
  }
  for (int n = 0; n < Columns; ++n) {
    for (int m = 0; m < Rows; ++m) {
      float sum = 0.0f;
      for (std::int64_t lane = 0; lane < lanes; ++lane) sum += sums[n][m][lane];
      for (std::int64_t k = whole; k < p.inner; ++k) sum += weight[n * p.inner + k] * x[m * p.x_stride + k];
      p.out[(row + m) * p.columns + column + n] = sum;
    }
  }
}

// All rows for weight rows begin..end, which stay in the first-level cache from one group of rows to the next.
template <int Rows, int Columns>
HEDGESPEC_INLINE void stripe(const LinearParams& p, std::int64_t row, std::int64_t begin, std::int64_t end) {
  std::int64_t column = begin;
  for (; column + Columns <= end; column += Columns) tile<Rows, Columns>(p, row, column);
  for (; column < end; ++column) tile<Rows, 1>(p, row, column);
}

HEDGESPEC_CLONES void columns_of(const LinearParams& p, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t group = 8, strip = 16;
  for (std::int64_t first = begin; first < end; first += strip) {
    const std::int64_t last = std::min(first + strip, end);
    for (std::int64_t row = 0; row < p.rows; row += group) {
      switch (std::min(group, p.rows - row)) {
        case 1: stripe<1, 4>(p, row, first, last); break;
        case 2: stripe<2, 4>(p, row, first, last); break;
        case 3: stripe<3, 4>(p, row, first, last); break;
        case 4: stripe<4, 2>(p, row, first, last); break;
        case 5: stripe<5, 2>(p, row, first, last); break;
        case 6: stripe<6, 2>(p, row, first, last); break;
        case 7: stripe<7, 1>(p, row, first, last); break;
        default: stripe<8, 1>(p, row, first, last); break;
      }
    }
  }
}

}  // namespace

void linear_cpu(const LinearParams& params) {
  constexpr std::int64_t strip = 16;
  const std::int64_t strips = (params.columns + strip - 1) / strip;
  const bool small = params.columns * params.inner < (1 << 14);  // waking a thread would cost more than it saves
  const std::int64_t threads = small ? 1 : std::max<std::int64_t>(1, std::min<std::int64_t>(params.threads, strips));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t part = 0; part < threads; ++part) {
    const std::int64_t begin = strips * part / threads * strip, end = strips * (part + 1) / threads * strip;
    columns_of(params, begin, std::min(end, params.columns));
  }
}

}  // namespace hedgespec
