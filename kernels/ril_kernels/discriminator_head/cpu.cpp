// The discriminator's head on the CPU; the definition is discriminator_head_reference, the formulas are in fused.py.
// T packed tokens, H hidden, N responses.
//
// A row's maths is written once and compiled twice, for AVX2 and for any CPU. Every sum runs in an order that neither
// the threads nor the batch change.
#include <algorithm>
#include <new>
#include <vector>

#include "abi.h"
#include "token_logprob/row.h"

#define RIL_INLINE inline __attribute__((always_inline))

namespace {

// The order of NORMS in fused.py.
constexpr int32_t NONE = 0;
constexpr int32_t LAYER = 2;
constexpr int64_t PARALLEL_FROM = 1 << 16;  // elements: below it, starting threads costs more than the loop
constexpr int64_t MOST_CHUNKS = 64;         // of the responses, each with its own sums for the head's gradients

// What backward needs of a response, (N, 4): d(x) = slope rstd (g - mean_g - x_hat mean_gx), x_hat = (x - mean) rstd.
struct Stats {
  float mean, rstd, mean_g, mean_gx;
};

template <typename T>
struct Input {
  const T* hidden;            // (T, H)
  const int64_t* last_index;  // (N,)
  const T* weight;            // (H,)
  const T* norm_weight;       // (H,) or null
  const T* norm_bias;         // (H,) or null
  const float* labels;        // (N,) or null
  const float* label_weights; // (N,) or null
  int64_t stride, num_hidden, num_responses;
  double temperature, label_smoothing, norm;
  bool vectors;

  double target(int64_t n) const { return labels[n] + label_smoothing * (1.0 - 2.0 * labels[n]); }
  double label_weight(int64_t n) const { return label_weights == nullptr ? 1.0 : label_weights[n]; }
  std::vector<float> direction() const {  // g = norm_weight * weight
    std::vector<float> g(static_cast<size_t>(num_hidden));
    for (int64_t h = 0; h < num_hidden; ++h) {
      g[h] = widen(weight[h]) * (norm_weight == nullptr ? 1.0f : widen(norm_weight[h]));
    }
    return g;
  }
};

template <typename T>
RIL_INLINE float row_sum(const T* x, int64_t count) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t h = 0; h < count; ++h) total += widen(x[h]);
  return total;
}

struct RowSums {
  float squares, dot;  // of x - mean: with itself, with g
};

template <typename T>
RIL_INLINE RowSums row_sums(const T* x, const float* g, float mean, int64_t count) {
  float squares = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : squares, dot)
  for (int64_t h = 0; h < count; ++h) {
    const float centred = widen(x[h]) - mean;
    squares += centred * centred;
    dot += centred * g[h];
  }
  return {squares, dot};
}

// Adds slope * x_hat to `sums` and writes slope * d(logit) / d(x) to `out`; each may be null.
template <typename T>
RIL_INLINE void row_grad(const T* x, const float* g, const Stats& row, float slope, int64_t count, float* sums, T* out) {
  const float scale = slope * row.rstd;
  if (sums != nullptr) {
#pragma omp simd
    for (int64_t h = 0; h < count; ++h) sums[h] += scale * (widen(x[h]) - row.mean);
  }
  if (out != nullptr) {
#pragma omp simd
    for (int64_t h = 0; h < count; ++h) {
      const float x_hat = (widen(x[h]) - row.mean) * row.rstd;
      narrow(scale * (g[h] - row.mean_g - x_hat * row.mean_gx), out + h);
    }
  }
}

template <typename T>
RIL_INLINE RowSums row_forward(const T* x, const float* g, bool centre, int64_t count, float* mean) {
  *mean = centre ? row_sum(x, count) / static_cast<float>(count) : 0.0f;
  return row_sums(x, g, *mean, count);
}

#if defined(__x86_64__)
template <typename T>
RIL_AVX2 RowSums row_forward_avx2(const T* x, const float* g, bool centre, int64_t count, float* mean) {
  return row_forward(x, g, centre, count, mean);
}
template <typename T>
RIL_AVX2 void row_grad_avx2(const T* x, const float* g, const Stats& row, float slope, int64_t count, float* sums,
                            T* out) {
  row_grad(x, g, row, slope, count, sums, out);
}
#else
#define row_forward_avx2 row_forward
#define row_grad_avx2 row_grad
#endif

template <typename T>
void forward(const Input<T>& in, const T* bias, int32_t final_norm, double eps, float* logits, float* scores,
             float* rewards, float* loss, Stats* stats) {
  const int64_t width = in.num_hidden, num = in.num_responses;
  const std::vector<float> g = in.direction();
  double constant = bias == nullptr ? 0.0 : widen(*bias), mean_g = 0.0;
  for (int64_t h = 0; h < width; ++h) {
    if (in.norm_bias != nullptr) constant += double{widen(in.weight[h])} * widen(in.norm_bias[h]);
    mean_g += g[h];
  }
  mean_g = final_norm == LAYER ? mean_g / static_cast<double>(width) : 0.0;

#pragma omp parallel for schedule(static) if (num * width >= PARALLEL_FROM)
  for (int64_t n = 0; n < num; ++n) {
    const T* x = in.hidden + in.last_index[n] * in.stride;
    Stats row{};
    const RowSums sums = in.vectors ? row_forward_avx2(x, g.data(), final_norm == LAYER, width, &row.mean)
                                    : row_forward(x, g.data(), final_norm == LAYER, width, &row.mean);
    row.rstd = final_norm == NONE ? 1.0f : static_cast<float>(1.0 / std::sqrt(double{sums.squares} / width + eps));
    row.mean_g = static_cast<float>(mean_g);
    row.mean_gx = final_norm == NONE ? 0.0f : row.rstd * sums.dot / static_cast<float>(width);
    const double logit = (double{row.rstd} * sums.dot + constant) / in.temperature, e = std::exp(-std::fabs(logit));
    logits[n] = static_cast<float>(logit);
    scores[n] = static_cast<float>((logit >= 0.0 ? 1.0 : e) / (1.0 + e));
    rewards[n] = std::isfinite(logits[n]) ? static_cast<float>(logits[n] < 0.0f) : NAN;
    if (stats != nullptr) stats[n] = row;
  }
  if (in.labels == nullptr) return;
  double total = 0.0;
  for (int64_t n = 0; n < num; ++n) {
    const double x = logits[n];
    total += in.label_weight(n) * (std::fmax(x, 0.0) - x * in.target(n) + std::log1p(std::exp(-std::fabs(x))));
  }
  *loss = static_cast<float>(total / in.norm);
}

// A row that is the last token of several responses has the sum of their slopes. Other rows of grad_hidden stay zeros.
template <typename T>
void backward(const Input<T>& in, int64_t num_tokens, const float* grad_logits, const float* grad_loss,
              const float* scores, const Stats* stats, T* grad_hidden, T* grad_weight, T* grad_bias, T* grad_norm_weight,
              T* grad_norm_bias) {
  const int64_t width = in.num_hidden;
  const std::vector<float> g = in.direction();
  std::vector<int64_t> response(static_cast<size_t>(num_tokens));  // of each last row, the last response it ends
  std::vector<double> slopes(static_cast<size_t>(num_tokens), 0.0);
  double slope_sum = 0.0;
  for (int64_t n = 0; n < in.num_responses; ++n) {
    double slope = grad_logits == nullptr ? 0.0 : grad_logits[n];
    if (grad_loss != nullptr) slope += *grad_loss * in.label_weight(n) * (scores[n] - in.target(n)) / in.norm;
    slope /= in.temperature;
    response[in.last_index[n]] = n;
    slopes[in.last_index[n]] += slope;
    slope_sum += slope;
  }
  const int64_t num = in.num_responses, size = std::max((num - 1) / MOST_CHUNKS + 1, PARALLEL_FROM / width + 1);
  const int64_t chunks = (num - 1) / size + 1;
  const bool wants_sums = grad_weight != nullptr || grad_norm_weight != nullptr;
  std::vector<float> sums(static_cast<size_t>(wants_sums ? chunks * width : 0), 0.0f);  // (chunks, H): S in fused.py

#pragma omp parallel for schedule(static) if (chunks > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    float* own = wants_sums ? sums.data() + chunk * width : nullptr;
    for (int64_t n = chunk * size; n < std::min(num, (chunk + 1) * size); ++n) {
      const int64_t t = in.last_index[n];
      if (response[t] != n) continue;
      T* out = grad_hidden == nullptr ? nullptr : grad_hidden + t * width;
      const T* x = in.hidden + t * in.stride;
      const float slope = static_cast<float>(slopes[t]);
      in.vectors ? row_grad_avx2(x, g.data(), stats[n], slope, width, own, out)
                 : row_grad(x, g.data(), stats[n], slope, width, own, out);
    }
  }
  if (grad_bias != nullptr) narrow(static_cast<float>(slope_sum), grad_bias);
  for (int64_t h = 0; h < width; ++h) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks && wants_sums; ++chunk) sum += sums[chunk * width + h];
    const double w = widen(in.weight[h]);
    const double gamma = in.norm_weight == nullptr ? 1.0 : widen(in.norm_weight[h]);
    const double beta = in.norm_bias == nullptr ? 0.0 : widen(in.norm_bias[h]);
    if (grad_weight != nullptr) narrow(static_cast<float>(gamma * sum + beta * slope_sum), grad_weight + h);
    if (grad_norm_weight != nullptr) narrow(static_cast<float>(w * sum), grad_norm_weight + h);
    if (grad_norm_bias != nullptr) narrow(static_cast<float>(w * slope_sum), grad_norm_bias + h);
  }
}

template <typename T>
bool valid(const Input<T>& in, int32_t isa) {
  const bool sizes = in.num_hidden > 0 && in.num_responses > 0 && in.stride >= 0;
  return in.hidden && in.last_index && in.weight && sizes && isa >= ISA_AUTO && isa <= ISA_SCALAR;
}

template <typename Function>
int32_t guarded(const Function& function) {
  try {
    function();
    return RIL_OK;
  } catch (const std::bad_alloc&) {
    return RIL_OUT_OF_MEMORY;
  } catch (...) {
    return RIL_INTERNAL_ERROR;
  }
}

}  // namespace

#define RIL_DISCRIMINATOR(SUFFIX, T)                                                                                   \
  extern "C" RIL_EXPORT int32_t ril_discriminator_forward_##SUFFIX(                                                    \
      const T* hidden, const int64_t* last_index, const T* weight, const T* bias, const T* norm_weight,                \
      const T* norm_bias, const float* labels, const float* label_weights, int64_t stride, int64_t num_hidden,         \
      int64_t num_responses, int32_t final_norm, double eps, double temperature, double label_smoothing, double norm,  \
      int32_t isa, float* logits, float* scores, float* rewards, float* loss, float* stats) {                          \
    const Input<T> in{hidden, last_index, weight,        norm_weight, norm_bias,       labels, label_weights,          \
                      stride, num_hidden, num_responses, temperature, label_smoothing, norm,   use_vectors(isa)};      \
    if (!valid(in, isa) || !logits || !scores || !rewards || (labels && !loss)) return RIL_BAD_ARGUMENT;               \
    if (final_norm < NONE || final_norm > LAYER) return RIL_BAD_ARGUMENT;                                              \
    return guarded([&] {                                                                                               \
      forward(in, bias, final_norm, eps, logits, scores, rewards, loss, reinterpret_cast<Stats*>(stats));              \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" RIL_EXPORT int32_t ril_discriminator_backward_##SUFFIX(                                                   \
      const T* hidden, const int64_t* last_index, const T* weight, const T* norm_weight, const T* norm_bias,           \
      const float* labels, const float* label_weights, const float* scores, const float* stats,                        \
      const float* grad_logits, const float* grad_loss, int64_t stride, int64_t num_hidden,                            \
      int64_t num_responses, int64_t num_tokens, double temperature, double label_smoothing, double norm,              \
      int32_t isa, T* grad_hidden, T* grad_weight, T* grad_bias, T* grad_norm_weight, T* grad_norm_bias) {             \
    const Input<T> in{hidden, last_index, weight,        norm_weight, norm_bias,       labels, label_weights,          \
                      stride, num_hidden, num_responses, temperature, label_smoothing, norm,   use_vectors(isa)};      \
    if (!valid(in, isa) || num_tokens < 1 || !scores || !stats || (grad_loss && !labels)) return RIL_BAD_ARGUMENT;     \
    return guarded([&] {                                                                                               \
      backward(in, num_tokens, grad_logits, grad_loss, scores, reinterpret_cast<const Stats*>(stats), grad_hidden,     \
               grad_weight, grad_bias, grad_norm_weight, grad_norm_bias);                                              \
    });                                                                                                                \
  }

RIL_DISCRIMINATOR(f32, float)
RIL_DISCRIMINATOR(bf16, Bf16)
