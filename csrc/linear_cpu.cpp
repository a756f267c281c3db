// x @ weight.T for few rows of x, on the CPU, for one weight or for the stacked weights of several heads.
//
// A round of speculative decoding multiplies every weight matrix with 2 to 8 rows. General matrix products pack the weights
// first, which for so few rows costs more than the product; here each weight is read once, where it lies, and used for all
// rows while it is in a register.

#include <algorithm>
#include <cstring>
#include <vector>

#include "hedgespec.h"

namespace hedgespec {
namespace {

constexpr std::int64_t lanes = 8;
constexpr std::int64_t strip = 12;              // columns that threads share out, whole: a multiple of every tile's
constexpr std::int64_t block_floats = 1 << 16;  // of a table, between heads: half of a small second-level cache
using Lanes = float __attribute__((vector_size(lanes * sizeof(float))));

HEDGESPEC_INLINE Lanes load(const float* from) {
  Lanes value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// One head: its weight, and its rows wherever they lie.
struct Head {
  std::int64_t inner, rows;
  const float* weight;        // of the head, or the table of all
  const std::int64_t* index;  // the table's row of each column, ascending or not; null: its own number
  const float* const* x;      // where each row starts
  float* const* out;

  HEDGESPEC_INLINE const float* column(std::int64_t number) const {
    return weight + (index ? index[number] : number) * inner;
  }
};

// out[m, n] for `Rows` rows of x and `Columns` columns: as many accumulators as registers hold.
template <int Rows, int Columns>
HEDGESPEC_INLINE void tile(const Head& head, std::int64_t row, std::int64_t column) {
  const float *x[Rows], *weight[Columns];
  for (int m = 0; m < Rows; ++m) x[m] = head.x[row + m];
  for (int n = 0; n < Columns; ++n) weight[n] = head.column(column + n);
  Lanes sums[Columns][Rows] = {};
  const std::int64_t whole = head.inner / lanes * lanes;
  for (std::int64_t k = 0; k < whole; k += lanes) {
    Lanes weights[Columns];
    for (int n = 0; n < Columns; ++n) weights[n] = load(weight[n] + k);
    for (int m = 0; m < Rows; ++m) {
      const Lanes value = load(x[m] + k);
      for (int n = 0; n < Columns; ++n) sums[n][m] += weights[n] * value;
    }
  }
  for (int n = 0; n < Columns; ++n) {
    for (int m = 0; m < Rows; ++m) {
      float sum = 0.0f;
      for (std::int64_t lane = 0; lane < lanes; ++lane) sum += sums[n][m][lane];
      for (std::int64_t k = whole; k < head.inner; ++k) sum += weight[n][k] * x[m][k];
      head.out[row + m][column + n] = sum;
    }
  }
}

// `Rows` rows for columns begin..end, whose weights stay in the first-level cache from one group of rows to the next.
template <int Rows, int Columns>
HEDGESPEC_INLINE void stripe(const Head& head, std::int64_t row, std::int64_t begin, std::int64_t end) {
  std::int64_t column = begin;
  for (; column + Columns <= end; column += Columns) tile<Rows, Columns>(head, row, column);
  for (; column < end; ++column) tile<Rows, 1>(head, row, column);
}

// Up to eight rows in one pass over the weights. More of them in groups of four: with three columns these need the fewest
// loads for a product, and the weights come from the cache after the first group.
HEDGESPEC_CLONES void columns_of(const Head& head, std::int64_t begin, std::int64_t end) {
  const std::int64_t group = head.rows <= 8 ? 8 : 4;
  for (std::int64_t first = begin; first < end; first += strip) {
    const std::int64_t last = std::min(first + strip, end);
    for (std::int64_t row = 0; row < head.rows; row += group) {
      switch (std::min(group, head.rows - row)) {
        case 1: stripe<1, 4>(head, row, first, last); break;
        case 2: stripe<2, 4>(head, row, first, last); break;
        case 3: stripe<3, 4>(head, row, first, last); break;
        case 4: stripe<4, 3>(head, row, first, last); break;
        case 5: stripe<5, 2>(head, row, first, last); break;
        case 6: stripe<6, 2>(head, row, first, last); break;
        case 7: stripe<7, 1>(head, row, first, last); break;
        default: stripe<8, 1>(head, row, first, last); break;
      }
    }
  }
}

// The heads that have rows, each with the addresses of its rows; `x` and `out` hold these addresses.
std::vector<Head> heads_of(const LinearParams& p, std::vector<const float*>& x, std::vector<float*>& out) {
  const std::int64_t rows = p.which ? p.rows : p.heads * p.rows;
  std::vector<std::int64_t> end(p.heads + 1, 0);  // of each head's rows, behind those of the heads before
  for (std::int64_t row = 0; row < rows; ++row) ++end[(p.which ? p.which[row] : row / p.rows) + 1];
  for (std::int64_t head = 0; head < p.heads; ++head) end[head + 1] += end[head];
  x.resize(rows);
  out.resize(rows);
  std::vector<Head> heads;
  for (std::int64_t head = 0; head < p.heads; ++head) {
    const std::int64_t first = end[head], count = end[head + 1] - first;
    if (count == 0) continue;
    heads.push_back({
        .inner = p.inner,
        .rows = count,
        .weight = p.index ? p.weight : p.weight + head * p.columns * p.inner,
        .index = p.index ? p.index + head * p.columns : nullptr,
        .x = x.data() + first,
        .out = out.data() + first,
    });
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t head = p.which ? p.which[row] : row / p.rows;
    const std::int64_t place = end[head]++;
    x[place] = p.x + (p.which ? 0 : head * p.x_stride_head) + (p.which ? row : row % p.rows) * p.x_stride_row;
    out[place] = p.out + row * p.columns;
  }
  return heads;
}

}  // namespace

void linear_cpu(const LinearParams& p) {
  if (p.rows == 0 || p.columns == 0) return;
  std::vector<const float*> x;
  std::vector<float*> out;
  const std::vector<Head> heads = heads_of(p, x, out);
  const std::int64_t count = static_cast<std::int64_t>(heads.size());

  // Where every index ascends the table is walked once, a block of its rows for all heads and then the next, so that each
  // row comes from memory once. Otherwise one head follows another, strip by strip.
  const bool walk = p.index && std::all_of(heads.begin(), heads.end(), [&](const Head& head) {
                      return std::is_sorted(head.index, head.index + p.columns);
                    });
  const std::int64_t strips = (p.columns + strip - 1) / strip;
  const std::int64_t block = std::max<std::int64_t>(strip, block_floats / std::max<std::int64_t>(p.inner, 1));
  const std::int64_t parts = walk ? (p.table_rows + block - 1) / block : count * strips;
  const bool small = count * p.columns * p.inner < (1 << 14);  // waking a thread would cost more than it saves
  const std::int64_t threads = small ? 1 : std::max<std::int64_t>(1, std::min<std::int64_t>(p.threads, parts));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t thread = 0; thread < threads; ++thread) {
    std::int64_t begin = parts * thread / threads;
    const std::int64_t end = parts * (thread + 1) / threads;
    if (walk) {
      for (; begin < end; ++begin) {
        for (const Head& head : heads) {
          const std::int64_t* const stop = head.index + p.columns;
          const std::int64_t* const first = std::lower_bound(head.index, stop, begin * block);
          columns_of(head, first - head.index, std::lower_bound(first, stop, (begin + 1) * block) - head.index);
        }
      }
    }
    while (begin < end) {
      const std::int64_t head = begin / strips, first = begin % strips;
      const std::int64_t last = std::min(first + end - begin, strips);
      columns_of(heads[head], first * strip, std::min(last * strip, p.columns));
      begin += last - first;
    }
  }
}

}  // namespace hedgespec
