// The epilogue of a tile of logits on the CPU: what token_logprob and policy_loss do between their GEMMs.
// A tile is R rows (tokens) by C columns of a vocabulary of V; the definition is token_logprob_reference.
//
//   tile_stats   one read:              the row's sums, carried from tile to tile; with the last tile log-prob of the
//                                       target, entropy and log-sum-exp. Asked to keep, it also writes exp(z - top),
//                                       so that no exp is taken twice.
//   tile_grad    one read, one write:   d(logits) from the gradients of log-prob and entropy, in place or elsewhere
//
// A row belongs to one thread and is summed in one order, so results do not depend on the number of threads.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "abi.h"
#include "row.h"

namespace {

// A tile: rows by columns of logits with a row stride, and where it lies in the vocabulary.
template <typename T>
struct Tile {
  const T* logits;
  int64_t stride, rows, columns, first, vocab;
  const int64_t* target;     // (R,), outside [0, V): the row does not count
  const float* temperature;  // (R,)
  float softcap;
  int32_t isa;

  bool valid() const {
    const bool inside = rows >= 0 && columns >= 1 && first >= 0 && first + columns <= vocab && stride >= columns;
    return logits && target && temperature && inside && isa >= ISA_AUTO && isa <= ISA_SCALAR;
  }
  bool counts(int64_t row) const { return target[row] >= 0 && target[row] < vocab; }
  bool holds_target(int64_t row) const { return target[row] >= first && target[row] < first + columns; }
  int64_t blocks() const { return (columns + BLOCK - 1) / BLOCK; }
  int64_t block_size(int64_t block) const { return block + 1 < blocks() ? BLOCK : columns - block * BLOCK; }
};

template <typename T>
int32_t stats(const Tile<T>& tile, Sums* all_sums, float* kept, int64_t kept_stride, float* tops, float* logprob,
              float* entropy, double* lse) {
  if (!tile.valid() || !all_sums || !logprob || !entropy || !lse) return RIL_BAD_ARGUMENT;
  const bool can_keep = std::is_same<T, float>::value && tile.softcap == 0.0f && kept_stride >= tile.columns;
  if ((kept == nullptr) != (tops == nullptr) || (kept != nullptr && !can_keep)) return RIL_BAD_ARGUMENT;
  const bool vectors = use_vectors(tile.isa), last = tile.first + tile.columns == tile.vocab;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < tile.rows; ++row) {
    Sums& sums = all_sums[row];
    if (tile.first == 0) sums = {-INF, 0.0, 0.0, 0.0};
    if (!tile.counts(row)) {
      logprob[row] = entropy[row] = 0.0f;
      lse[row] = 0.0;
      continue;
    }
    const T* line = tile.logits + row * tile.stride;
    const Head head{tile.temperature[row], tile.softcap};
    float slope;
    if (tile.holds_target(row)) sums.chosen = scaled(widen(line[tile.target[row] - tile.first]), head, &slope);
    for (int64_t block = 0; block < tile.blocks(); ++block) {
      float* const out = kept == nullptr ? nullptr : kept + row * kept_stride + block * BLOCK;
      block_sums(line + block * BLOCK, tile.block_size(block), head, vectors, &sums, out);
      if (tops != nullptr) tops[row * tile.blocks() + block] = sums.origin();
    }
    if (!last) continue;
    const double log_mass = std::log(sums.mass);
    // Relative to the top, not to the log-sum-exp: the difference of two large float32 would lose digits.
    logprob[row] = static_cast<float>(sums.chosen - sums.top - log_mass);
    entropy[row] = static_cast<float>(log_mass - sums.weight / sums.mass);
    lse[row] = sums.top + log_mass;
  }
  return RIL_OK;
}

// d(logits) of a row from its logits.
template <typename T>
void grad_of_logits(const Tile<T>& tile, int64_t row, T* out, bool vectors, double lse, float entropy,
                    float grad_logprob, float grad_entropy) {
  const T* line = tile.logits + row * tile.stride;
  const Head head{tile.temperature[row], tile.softcap};
  const LogSumExp total(lse);
  const int64_t own = tile.target[row] - tile.first;
  float slope = 0.0f, logprob = 0.0f;
  if (tile.holds_target(row)) logprob = total.logprob(scaled(widen(line[own]), head, &slope));
  row_grad(line, out, tile.columns, head, vectors, total, entropy, grad_logprob, grad_entropy);
  if (!tile.holds_target(row)) return;
  // The target's own element, in one rounding: 1 - p and not p subtracted from what was rounded already.
  const float p = exp_or_zero(logprob);
  const float through_entropy = p == 0.0f ? 0.0f : p * grad_entropy * (logprob + entropy);
  narrow(slope * (grad_logprob * (1.0f - p) - through_entropy), out + own);
}

// d(logits) of a row from the exp(z - top) that `stats` kept: p is that times exp(top - lse), one factor per block.
void grad_of_kept(const Tile<float>& tile, int64_t row, float* out, const float* tops, double lse, float grad_logprob) {
  const float* line = tile.logits + row * tile.stride;
  const float push = grad_logprob / tile.temperature[row];
  const int64_t own = tile.target[row] - tile.first;
  float own_p = 0.0f;
  for (int64_t block = 0; block < tile.blocks(); ++block) {
    const double share = std::exp(tops[block] - lse);
    const int64_t begin = block * BLOCK, end = begin + tile.block_size(block);
    if (own >= begin && own < end) own_p = static_cast<float>(line[own] * share);
    const float factor = static_cast<float>(-push * share);
    for (int64_t i = begin; i < end; ++i) out[i] = factor * line[i];
  }
  if (tile.holds_target(row)) out[own] = push * (1.0f - own_p);
}

template <typename T>
int32_t grad(const Tile<T>& tile, T* out, int64_t out_stride, const float* tops, const double* lse,
             const float* entropy, const float* grad_logprob, const float* grad_entropy) {
  if (!tile.valid() || !out || out_stride < tile.columns || !lse || !entropy || !grad_logprob) return RIL_BAD_ARGUMENT;
  constexpr bool KEEPS = std::is_same<T, float>::value;
  // What is kept has lost the logits that the gradients of entropy and soft-cap need.
  if (tops != nullptr ? (!KEEPS || grad_entropy != nullptr || tile.softcap != 0.0f) : grad_entropy == nullptr) {
    return RIL_BAD_ARGUMENT;
  }
  const bool vectors = use_vectors(tile.isa);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < tile.rows; ++row) {
    T* line = out + row * out_stride;
    const float bonus = grad_entropy == nullptr ? 0.0f : grad_entropy[row];
    if (!tile.counts(row) || (grad_logprob[row] == 0.0f && bonus == 0.0f)) {
      std::memset(line, 0, static_cast<size_t>(tile.columns) * sizeof(T));
      continue;
    }
    if constexpr (KEEPS) {
      if (tops != nullptr) {
        grad_of_kept(tile, row, line, tops + row * tile.blocks(), lse[row], grad_logprob[row]);
        continue;
      }
    }
    grad_of_logits(tile, row, line, vectors, lse[row], entropy[row], grad_logprob[row], bonus);
  }
  return RIL_OK;
}

}  // namespace

// A tile of logits (see Tile) -> sums (R, 4), carried from the tile before; log-prob, entropy and log-sum-exp (R,) are
// written with the last tile of a row. kept (R, C) float32, which may be the tile, gets exp(z - top), and tops
// (R, blocks of 1024) the tops; both or neither is given.
#define RIL_TILE_STATS(name, type)                                                                                    \
  extern "C" RIL_EXPORT int32_t name(const void* logits, int64_t stride, int64_t rows, int64_t columns,               \
                                     int64_t first, int64_t vocab, const int64_t* target, const float* temperature,   \
                                     float softcap, int32_t isa, double* sums, float* kept, int64_t kept_stride,      \
                                     float* tops, float* logprob, float* entropy, double* lse) {                      \
    return stats(Tile<type>{static_cast<const type*>(logits), stride, rows, columns, first, vocab, target,            \
                            temperature, softcap, isa},                                                               \
                 reinterpret_cast<Sums*>(sums), kept, kept_stride, tops, logprob, entropy, lse);                      \
  }
RIL_TILE_STATS(ril_tile_stats_f32, float)
RIL_TILE_STATS(ril_tile_stats_bf16, Bf16)

// The same tile, or what tile_stats kept of it, and the row's gradients -> d(logits) in out, which may be the tile.
// Rows that do not count, or whose gradients are 0, become 0. Either tops of tile_stats or grad_entropy is given.
#define RIL_TILE_GRAD(name, type)                                                                                     \
  extern "C" RIL_EXPORT int32_t name(const void* logits, int64_t stride, int64_t rows, int64_t columns,               \
                                     int64_t first, int64_t vocab, const int64_t* target, const float* temperature,   \
                                     float softcap, int32_t isa, void* out, int64_t out_stride, const float* tops,    \
                                     const double* lse, const float* entropy, const float* grad_logprob,              \
                                     const float* grad_entropy) {                                                     \
    return grad(Tile<type>{static_cast<const type*>(logits), stride, rows, columns, first, vocab, target,             \
                           temperature, softcap, isa},                                                                \
                static_cast<type*>(out), out_stride, tops, lse, entropy, grad_logprob, grad_entropy);                 \
  }
RIL_TILE_GRAD(ril_tile_grad_f32, float)
RIL_TILE_GRAD(ril_tile_grad_bf16, Bf16)

// Ask for huge pages in [memory, memory + bytes): a new buffer of half a gigabyte is 139,000 page faults otherwise.
// A hint: without such pages nothing changes.
extern "C" RIL_EXPORT int32_t ril_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
  return RIL_OK;
}
