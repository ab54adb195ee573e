// The maths of a row of logits, scalar and AVX2: exp, tanh, the running sums of a softmax, and d(logits).
// cpu.cpp calls block_sums and row_grad, sampling's block_sums; the definition is token_logprob_reference.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#define RIL_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace {

constexpr int64_t BLOCK = 1024;          // elements that stay in the L1 cache between the passes over a block
constexpr float EXP_LOW = -87.33654f;    // exp of anything below it is 0 here: smaller than any normal float32
constexpr float INF = std::numeric_limits<float>::infinity();

// What a row needs to turn a logit into z = softcap * tanh(logit / softcap) / temperature.
struct Head {
  float temperature;
  float softcap;  // 0: none
};

struct Bf16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, Bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = 0x7fc0;  // NaN stays NaN
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to the nearest even
  }
}

inline float exp_or_zero(float x) { return x < EXP_LOW ? 0.0f : std::exp(x); }

// z of a logit, and dz / dlogit in *slope.
inline float scaled(float logit, const Head& head, float* slope) {
  *slope = 1.0f / head.temperature;
  if (head.softcap == 0.0f) return logit / head.temperature;
  const float tanh = std::tanh(logit / head.softcap);
  *slope *= 1.0f - tanh * tanh;
  return head.softcap * tanh / head.temperature;
}

// Log-sum-exp as two float32: z - high is exact where p is large, so that a logit of 300 does not cost p 5 digits.
struct LogSumExp {
  float high, low;

  explicit LogSumExp(double value) : high(static_cast<float>(value)), low(static_cast<float>(value - high)) {
    if (!std::isfinite(high)) low = 0.0f;
  }
  float logprob(float z) const { return z - high - low; }
};

// Sums over a row, relative to the largest z so far. Memory of the caller's, four float64 per row.
struct Sums {
  double top;     // a float32
  double mass;    // sum of exp(z - top)
  double weight;  // sum of exp(z - top) (z - top)
  double chosen;  // z of the target

  void rescale(float next) {
    if (!(next > top)) return;
    if (mass > 0.0) {
      const double shift = top - next, factor = std::exp(shift);
      weight = factor * (weight + shift * mass);
      mass *= factor;
    }
    top = next;
  }
  // Rows of nothing but -inf (or NaN) so far are summed relative to 0.
  float origin() const { return top == -INF ? 0.0f : static_cast<float>(top); }
};

// Adds a block of a row to its sums. With `kept` (float32 only, may be `logits`) it leaves exp(z - top) there, with the
// top that the sums then have.
template <typename T>
void block_sums_scalar(const T* logits, int64_t count, const Head& head, Sums* sums, float* kept) {
  float z[BLOCK], slope;
  float top = -INF;
  for (int64_t i = 0; i < count; ++i) {
    z[i] = scaled(widen(logits[i]), head, &slope);
    top = z[i] > top ? z[i] : top;
  }
  sums->rescale(top);
  top = sums->origin();
  float mass = 0.0f, weight = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float distance = z[i] < EXP_LOW + top ? EXP_LOW * 2 : z[i] - top;
    const float e = exp_or_zero(distance);
    mass += e;
    weight += e * distance;
    if (kept != nullptr) kept[i] = e;
  }
  sums->mass += mass;
  sums->weight += weight;
}

template <typename T>
void row_grad_scalar(const T* logits, T* out, int64_t count, const Head& head, const LogSumExp& lse, float entropy,
                     float grad_logprob, float grad_entropy) {
  for (int64_t i = 0; i < count; ++i) {
    float slope;
    const float logprob = lse.logprob(scaled(widen(logits[i]), head, &slope));
    const float p = exp_or_zero(logprob);
    const float inner = p == 0.0f ? 0.0f : p * (grad_logprob + grad_entropy * (logprob + entropy));
    narrow(p == p ? -slope * inner : p, out + i);
  }
}

#if defined(__x86_64__)

struct Vec {
  __m256 z, slope;
};

// exp for x <= 88, within 2 ulp (Cephes): exactly 0 below EXP_LOW, NaN for NaN.
RIL_AVX2 inline __m256 exp8(__m256 x) {
  const __m256 live = _mm256_cmp_ps(x, _mm256_set1_ps(EXP_LOW), _CMP_NLT_UQ);  // true for NaN as well
  const __m256 c = _mm256_max_ps(_mm256_set1_ps(EXP_LOW), x);                  // the second operand where one is NaN
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(c, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), c);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(exponent)), live);
}

// tanh (Cephes): a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
RIL_AVX2 inline __m256 tanh8(__m256 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const __m256 size = _mm256_andnot_ps(sign, x);
  const __m256 e = exp8(_mm256_mul_ps(size, _mm256_set1_ps(-2.0f)));
  const __m256 one = _mm256_set1_ps(1.0f);
  const __m256 far = _mm256_or_ps(_mm256_div_ps(_mm256_sub_ps(one, e), _mm256_add_ps(one, e)), _mm256_and_ps(sign, x));
  const __m256 s = _mm256_mul_ps(x, x);
  __m256 p = _mm256_set1_ps(-5.70498872745e-3f);
  p = _mm256_fmadd_ps(p, s, _mm256_set1_ps(2.06390887954e-2f));
  p = _mm256_fmadd_ps(p, s, _mm256_set1_ps(-5.37397155531e-2f));
  p = _mm256_fmadd_ps(p, s, _mm256_set1_ps(1.33314422036e-1f));
  p = _mm256_fmadd_ps(p, s, _mm256_set1_ps(-3.33332819422e-1f));
  const __m256 near = _mm256_fmadd_ps(_mm256_mul_ps(p, s), x, x);
  return _mm256_blendv_ps(far, near, _mm256_cmp_ps(size, _mm256_set1_ps(0.625f), _CMP_LT_OQ));
}

RIL_AVX2 inline __m256 load8(const float* at) { return _mm256_loadu_ps(at); }
RIL_AVX2 inline __m256 load8(const Bf16* at) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
RIL_AVX2 inline void store8(float* at, __m256 value) { _mm256_storeu_ps(at, value); }
RIL_AVX2 inline void store8(Bf16* at, __m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_castsi256_si128(packed));
}

// Known at compile time, so that a head pays only for what it has.
enum class Form { PLAIN, TEMPERED, CAPPED };

template <Form FORM>
RIL_AVX2 inline Vec scaled8(__m256 logit, const Head& head) {
  if (FORM == Form::PLAIN) return {logit, _mm256_set1_ps(1.0f)};
  const __m256 temperature = _mm256_set1_ps(head.temperature);
  __m256 slope = _mm256_set1_ps(1.0f / head.temperature);
  if (FORM == Form::TEMPERED) return {_mm256_div_ps(logit, temperature), slope};
  const __m256 cap = _mm256_set1_ps(head.softcap);
  const __m256 tanh = tanh8(_mm256_div_ps(logit, cap));
  slope = _mm256_mul_ps(slope, _mm256_fnmadd_ps(tanh, tanh, _mm256_set1_ps(1.0f)));
  return {_mm256_div_ps(_mm256_mul_ps(cap, tanh), temperature), slope};
}

RIL_AVX2 inline float sum8(__m256 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

RIL_AVX2 inline float max8(__m256 v) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

struct Totals {
  __m256 mass, weight;
};

// exp(z - top) of eight, added to the totals.
RIL_AVX2 inline __m256 add_exp8(__m256 z, __m256 top, Totals* totals) {
  // The floor keeps 0 * (-inf) out of the weight.
  const __m256 distance = _mm256_max_ps(_mm256_set1_ps(EXP_LOW * 2), _mm256_sub_ps(z, top));
  const __m256 e = exp8(distance);
  totals->mass = _mm256_add_ps(totals->mass, e);
  totals->weight = _mm256_fmadd_ps(e, distance, totals->weight);
  return e;
}

template <typename T, Form FORM>
RIL_AVX2 void block_sums_avx2(const T* logits, int64_t count, const Head& head, Sums* sums, float* kept) {
  constexpr int64_t STEP = 16;
  constexpr bool IN_PLACE = FORM == Form::PLAIN && std::is_same<T, float>::value;  // z is the logit itself
  alignas(32) float copy[IN_PLACE ? 1 : BLOCK], tail[STEP];
  const int64_t whole = count / STEP * STEP;
  for (int64_t i = 0; i < STEP; ++i) {  // the last few, filled up with what adds nothing
    float slope;
    tail[i] = whole + i < count ? scaled(widen(logits[whole + i]), head, &slope) : -INF;
  }
  __m256 top0 = _mm256_max_ps(_mm256_load_ps(tail), _mm256_set1_ps(-INF));  // the second operand where one is NaN
  __m256 top1 = _mm256_max_ps(_mm256_load_ps(tail + 8), _mm256_set1_ps(-INF));
  for (int64_t i = 0; i < whole; i += STEP) {
    const __m256 a = scaled8<FORM>(load8(logits + i), head).z, b = scaled8<FORM>(load8(logits + i + 8), head).z;
    if constexpr (!IN_PLACE) {
      _mm256_store_ps(copy + i, a);
      _mm256_store_ps(copy + i + 8, b);
    }
    top0 = _mm256_max_ps(a, top0);
    top1 = _mm256_max_ps(b, top1);
  }
  const float* z = copy;
  if constexpr (IN_PLACE) z = logits;
  sums->rescale(max8(_mm256_max_ps(top0, top1)));
  const __m256 top = _mm256_set1_ps(sums->origin());
  Totals even{_mm256_setzero_ps(), _mm256_setzero_ps()}, odd = even;
  for (int64_t i = 0; i < whole; i += STEP) {
    const __m256 a = add_exp8(_mm256_loadu_ps(z + i), top, &even), b = add_exp8(_mm256_loadu_ps(z + i + 8), top, &odd);
    if (kept != nullptr) {
      _mm256_storeu_ps(kept + i, a);
      _mm256_storeu_ps(kept + i + 8, b);
    }
  }
  _mm256_store_ps(tail, add_exp8(_mm256_load_ps(tail), top, &even));
  _mm256_store_ps(tail + 8, add_exp8(_mm256_load_ps(tail + 8), top, &odd));
  if (kept != nullptr) std::memcpy(kept + whole, tail, static_cast<size_t>(count - whole) * sizeof(float));
  sums->mass += sum8(_mm256_add_ps(even.mass, odd.mass));
  sums->weight += sum8(_mm256_add_ps(even.weight, odd.weight));
}

template <typename T, Form FORM>
RIL_AVX2 void row_grad_avx2(const T* logits, T* out, int64_t count, const Head& head, const LogSumExp& lse,
                            float entropy, float grad_logprob, float grad_entropy) {
  const __m256 high = _mm256_set1_ps(lse.high), rest = _mm256_set1_ps(lse.low), low = _mm256_set1_ps(EXP_LOW * 2);
  // p (grad_logprob + grad_entropy (logprob + entropy)) with the constants taken together
  const __m256 constant = _mm256_set1_ps(-(grad_logprob + grad_entropy * entropy));
  const __m256 factor = _mm256_set1_ps(-grad_entropy);
  const int64_t whole = count & ~int64_t{7};
  for (int64_t i = 0; i < whole; i += 8) {
    const Vec v = scaled8<FORM>(load8(logits + i), head);
    const __m256 logprob = _mm256_max_ps(low, _mm256_sub_ps(_mm256_sub_ps(v.z, high), rest));
    const __m256 p = exp8(logprob);
    const __m256 inner = _mm256_fmadd_ps(factor, logprob, constant);
    store8(out + i, _mm256_mul_ps(v.slope, _mm256_mul_ps(p, inner)));
  }
  if (whole < count) {
    row_grad_scalar(logits + whole, out + whole, count - whole, head, lse, entropy, grad_logprob, grad_entropy);
  }
}

bool has_avx2() {
  static const bool answer = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return answer;
}

#endif

constexpr int32_t ISA_AUTO = 0;
constexpr int32_t ISA_SCALAR = 1;  // asked for by tests, and used where there is no AVX2

inline bool use_vectors(int32_t isa) {
#if defined(__x86_64__)
  return isa == ISA_AUTO && has_avx2();
#else
  (void)isa;
  return false;
#endif
}

template <typename T>
void block_sums(const T* logits, int64_t count, const Head& head, bool vectors, Sums* sums, float* kept) {
#if defined(__x86_64__)
  if (vectors && head.softcap != 0.0f) return block_sums_avx2<T, Form::CAPPED>(logits, count, head, sums, kept);
  if (vectors && head.temperature != 1.0f) return block_sums_avx2<T, Form::TEMPERED>(logits, count, head, sums, kept);
  if (vectors) return block_sums_avx2<T, Form::PLAIN>(logits, count, head, sums, kept);
#endif
  (void)vectors;
  block_sums_scalar(logits, count, head, sums, kept);
}

template <typename T>
void row_grad(const T* logits, T* out, int64_t count, const Head& head, bool vectors, const LogSumExp& lse,
              float entropy, float grad_logprob, float grad_entropy) {
#if defined(__x86_64__)
  if (vectors && head.softcap != 0.0f) {
    return row_grad_avx2<T, Form::CAPPED>(logits, out, count, head, lse, entropy, grad_logprob, grad_entropy);
  }
  if (vectors && head.temperature != 1.0f) {
    return row_grad_avx2<T, Form::TEMPERED>(logits, out, count, head, lse, entropy, grad_logprob, grad_entropy);
  }
  if (vectors) {
    return row_grad_avx2<T, Form::PLAIN>(logits, out, count, head, lse, entropy, grad_logprob, grad_entropy);
  }
#endif
  (void)vectors;
  row_grad_scalar(logits, out, count, head, lse, entropy, grad_logprob, grad_entropy);
}

}  // namespace
