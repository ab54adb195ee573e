// A token of each row of logits on the CPU; the definition is sample_reference. V vocabulary, W = ceil(V / 32).
//
// Logits are read a block at a time, which stays in the L1 cache while it adds to the row's log-sum-exp and gives what
// the draw needs of it:
//   top-k      the candidates above the k-th largest so far: one read of the row
//   otherwise  the block's own sum of exp(y / temperature); the block in which the draw lies is then read again. With
//              top-p alone it is the blocks that reach a bound, below which no token can stay.
// A row belongs to one thread and is summed in one order, so a result depends neither on the threads nor on the batch.
#include <algorithm>
#include <new>
#include <vector>

#include "abi.h"
#include "token_logprob/row.h"

namespace {

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

// The first of the four words of Philox4x32-10 (Salmon et al., 2011), as a number in (0, 1).
double uniform(int64_t seed, int64_t question, int64_t sample_number, int64_t position) {
  const auto low = [](int64_t value) { return static_cast<uint32_t>(value); };
  const auto high = [](int64_t value) { return static_cast<uint32_t>(static_cast<uint64_t>(value) >> 32); };
  uint32_t c0 = low(position), c1 = low(sample_number), c2 = low(question), c3 = high(question);
  uint32_t k0 = low(seed), k1 = high(seed);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return (c0 + 0.5) * 0x1p-32;
}

struct Settings {
  float temperature;
  int64_t top_k;  // 0: all
  double top_p;
  float penalty;
  const int32_t* banned;  // (W,) or null
};

struct Candidate {
  float value;  // y: the logit after the penalty
  int32_t token;
  double weight;  // exp((y - top) / temperature)

  bool before(const Candidate& other) const {
    return value != other.value ? value > other.value : token < other.token;
  }
};

bool first_of(const Candidate& a, const Candidate& b) { return a.before(b); }

// The `most` best of what it is offered in order of tokens, and a threshold that a value must pass to matter.
struct Candidates {
  size_t most;
  float threshold;
  std::vector<Candidate> held;

  // Twice as many are held before the worse half goes: on average a constant number of steps for each.
  size_t room() const { return most + std::max(most, size_t{64}); }
  void offer(float value, int64_t token) {
    if (!(value > threshold)) return;  // an equal one has the higher id
    held.push_back({value, static_cast<int32_t>(token), 0.0});
    if (held.size() >= room()) shrink();
  }
  void shrink() {
    if (held.size() <= most) return;
    std::nth_element(held.begin(), held.begin() + (most - 1), held.end(), first_of);
    held.resize(most);
    threshold = held.back().value;
  }
};

#if defined(__x86_64__)
// Offers all values but the last few; gives how many.
RIL_AVX2 int64_t scan_avx2(const float* values, int64_t first, int64_t count, Candidates* candidates) {
  constexpr int64_t STEP = 32;
  const int64_t whole = count / STEP * STEP;
  __m256 bar = _mm256_set1_ps(candidates->threshold);
  for (int64_t i = 0; i < whole; i += STEP) {
    const float* at = values + i;
    const __m256 a = _mm256_cmp_ps(_mm256_loadu_ps(at), bar, _CMP_GT_OQ);
    const __m256 b = _mm256_cmp_ps(_mm256_loadu_ps(at + 8), bar, _CMP_GT_OQ);
    const __m256 c = _mm256_cmp_ps(_mm256_loadu_ps(at + 16), bar, _CMP_GT_OQ);
    const __m256 d = _mm256_cmp_ps(_mm256_loadu_ps(at + 24), bar, _CMP_GT_OQ);
    if (_mm256_movemask_ps(_mm256_or_ps(_mm256_or_ps(a, b), _mm256_or_ps(c, d))) == 0) continue;
    for (int64_t j = 0; j < STEP; ++j) candidates->offer(at[j], first + i + j);
    bar = _mm256_set1_ps(candidates->threshold);
  }
  return whole;
}
#endif

void scan(const float* values, int64_t first, int64_t count, bool vectors, Candidates* candidates) {
  int64_t done = 0;
#if defined(__x86_64__)
  if (vectors) done = scan_avx2(values, first, count, candidates);
#endif
  (void)vectors;
  for (int64_t i = done; i < count; ++i) candidates->offer(values[i], first + i);
}

// What is left of a block once bans and penalties are applied.
struct Block {
  const float* y;
  int64_t first, count;
  float top;     // of y
  bool changed;  // by a ban or a penalty
};

struct Drawn {
  int64_t token = -1;  // -1: nothing to draw
  double weight = 0.0, total = 1.0;
};

template <typename T>
class Row {
 public:
  Row(const T* logits, int64_t vocab, const int32_t* seen, const Settings& settings, bool vectors)
      : logits_(logits), vocab_(vocab), seen_(seen), settings_(settings), vectors_(vectors) {}

  Drawn draw(double u) { return settings_.top_k > 0 ? draw_of_top_k(u) : draw_of_all(u); }

  // Of the logits as they came. NaN where one of them is NaN or +inf.
  double logprob(int64_t token) const { return widen(logits_[token]) - sums_.top - std::log(sums_.mass); }
  bool valid() const { return sums_.mass == sums_.mass; }

  int64_t lowest_allowed() const {
    for (int64_t token = 0; settings_.banned != nullptr && token < vocab_; ++token) {
      if (!(settings_.banned[token / 32] >> (token % 32) & 1)) return token;
    }
    return 0;
  }

 private:
  int64_t blocks() const { return (vocab_ + BLOCK - 1) / BLOCK; }
  double weight(double y, double top) const { return std::exp((y - top) / settings_.temperature); }

  // One read of a block: its part of the policy's log-sum-exp, then y.
  Block first_read(int64_t index, Sums* own) {
    const int64_t first = index * BLOCK, count = std::min(BLOCK, vocab_ - first);
    *own = {-INF, 0.0, 0.0, 0.0};
    block_sums(logits_ + first, count, Head{1.0f, 0.0f}, vectors_, own, nullptr);
    sums_.rescale(own->top);
    sums_.mass += own->mass == 0.0 ? 0.0 : own->mass * std::exp(own->origin() - sums_.origin());
    return block_of(index, static_cast<float>(own->top));
  }

  // The logits themselves where they are float32 and no bit of the block is set, else a copy.
  Block block_of(int64_t index, float top) {
    const int64_t first = index * BLOCK, count = std::min(BLOCK, vocab_ - first), words = (count + 31) / 32;
    const int32_t* banned = settings_.banned == nullptr ? nullptr : settings_.banned + first / 32;
    const int32_t* seen = seen_ == nullptr ? nullptr : seen_ + first / 32;
    int32_t any = 0;
    for (int64_t w = 0; w < words; ++w) any |= (banned ? banned[w] : 0) | (seen ? seen[w] : 0);
    if constexpr (std::is_same<T, float>::value) {
      if (any == 0) return {logits_ + first, first, count, top, false};
    }
    for (int64_t i = 0; i < count; ++i) y_[i] = widen(logits_[first + i]);
    if (any == 0) return {y_, first, count, top, false};
    for (int64_t w = 0; w < words; ++w) {
      for (uint32_t bits = seen ? seen[w] : 0; bits != 0; bits &= bits - 1) {
        const int64_t i = w * 32 + __builtin_ctz(bits);
        if (i < count) y_[i] = y_[i] > 0.0f ? y_[i] / settings_.penalty : y_[i] * settings_.penalty;
      }
      for (uint32_t bits = banned ? banned[w] : 0; bits != 0; bits &= bits - 1) {
        const int64_t i = w * 32 + __builtin_ctz(bits);
        if (i < count) y_[i] = -INF;
      }
    }
    return {y_, first, count, largest(y_, count), true};
  }

  // Eight at a time, which a compiler makes one instruction.
  static float largest(const float* values, int64_t count) {
    float lanes[8];
    std::fill(lanes, lanes + 8, -INF);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      for (int64_t j = 0; j < 8; ++j) lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
    }
    for (; i < count; ++i) lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
    return *std::max_element(lanes, lanes + 8);
  }

  Drawn draw_of_top_k(double u) {
    const auto most = static_cast<size_t>(std::min(settings_.top_k, vocab_));
    Candidates best{most, -INF, {}};
    Sums own;
    for (int64_t index = 0; index < blocks(); ++index) {
      const Block block = first_read(index, &own);
      scan(block.y, block.first, block.count, vectors_, &best);
    }
    best.shrink();
    std::sort(best.held.begin(), best.held.end(), [](auto& a, auto& b) { return a.token < b.token; });
    float top = -INF;
    for (const Candidate& each : best.held) top = std::max(top, each.value);
    if (!valid() || !std::isfinite(top)) return {};
    double total = 0.0;
    for (Candidate& each : best.held) total += each.weight = weight(each.value, top);
    return draw_of(best.held, total, u);
  }

  Drawn draw_of_all(double u) {
    std::vector<Sums> masses(static_cast<size_t>(blocks()));  // of y / temperature, relative to the block's top
    float top = -INF;
    for (int64_t index = 0; index < blocks(); ++index) {
      Sums& own = masses[index];
      const Block block = first_read(index, &own);
      if (block.changed || settings_.temperature != 1.0f) own = tempered(block);
      own.top = block.top;
      top = std::max(top, block.top);
    }
    if (!valid() || !std::isfinite(top)) return {};
    double total = 0.0;
    for (Sums& own : masses) total += own.mass *= own.mass == 0.0 ? 0.0 : weight(own.top, top);
    if (settings_.top_p < 1.0) return draw_of_top_p(masses, top, total, u);
    double below = 0.0;
    int64_t chosen = -1;
    for (int64_t index = 0; index < blocks(); ++index) {
      if (masses[index].mass == 0.0) continue;
      if (chosen >= 0) below += masses[chosen].mass;
      chosen = index;  // the last with any mass, should rounding leave none that passes
      if (below + masses[index].mass > u * total) break;
    }
    Drawn drawn;
    drawn.total = total;
    const Block block = block_of(chosen, 0.0f);
    for (int64_t i = 0; i < block.count; ++i) {
      const double each = weight(block.y[i], top);
      if (each == 0.0) continue;
      drawn.token = block.first + i;
      drawn.weight = each;
      if ((below += each) > u * total) break;
    }
    return drawn;
  }

  // All that weigh less than an even share of what top-p leaves out weigh less than it together: they cannot stay.
  Drawn draw_of_top_p(const std::vector<Sums>& masses, float top, double total, double u) {
    const double share = (1.0 - settings_.top_p) * total / static_cast<double>(vocab_);
    const double bound = top + settings_.temperature * (std::log(share) - 0.01);  // a margin for rounding
    const float threshold = std::nextafter(static_cast<float>(bound), -INF);
    Candidates some{static_cast<size_t>(vocab_), threshold, {}};
    for (int64_t index = 0; index < blocks(); ++index) {
      if (!(masses[index].top > threshold)) continue;
      const Block block = block_of(index, 0.0f);
      scan(block.y, block.first, block.count, vectors_, &some);
    }
    for (Candidate& each : some.held) each.weight = weight(each.value, top);
    return draw_of(some.held, total, u);
  }

  // From candidates in order of tokens, of which top-p leaves some.
  Drawn draw_of(const std::vector<Candidate>& candidates, double total, double u) const {
    Candidate last{-INF, 0, 0.0};
    if (settings_.top_p < 1.0) {
      last = last_kept(candidates, settings_.top_p * total);
      total = 0.0;
      for (const Candidate& each : candidates) total += last.before(each) ? 0.0 : each.weight;
    }
    Drawn drawn;
    drawn.total = total;
    double below = 0.0;
    for (const Candidate& each : candidates) {
      if (each.weight == 0.0 || last.before(each)) continue;
      drawn.token = each.token;
      drawn.weight = each.weight;
      if ((below += each.weight) > u * total) break;
    }
    return drawn;
  }

  // The last candidate, from the largest down, before which the weights sum to less than `target`: each step halves
  // the range in which it lies, so nothing is sorted.
  static Candidate last_kept(std::vector<Candidate> candidates, double target) {
    const auto begin = candidates.begin();
    int64_t low = 0, high = static_cast<int64_t>(candidates.size());
    double above = 0.0;  // weight of [0, low)
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      std::nth_element(begin + low, begin + middle, begin + high, first_of);
      double part = 0.0;
      for (int64_t i = low; i < middle; ++i) part += candidates[i].weight;
      if (above + part < target) {
        above += part;
        low = middle;
      } else {
        high = middle;
      }
    }
    return candidates[low];
  }

  Sums tempered(const Block& block) {
    Sums own{-INF, 0.0, 0.0, 0.0};
    if (block.top == -INF) return own;
    // Relative to the top before the division: a large logit over a small temperature would lose digits.
    for (int64_t i = 0; i < block.count; ++i) y_[i] = block.y[i] - block.top;
    block_sums(y_, block.count, Head{settings_.temperature, 0.0f}, vectors_, &own, nullptr);
    return own;
  }

  const T* const logits_;
  const int64_t vocab_;
  const int32_t* const seen_;
  const Settings& settings_;
  const bool vectors_;
  Sums sums_{-INF, 0.0, 0.0, 0.0};  // of the policy
  alignas(32) float y_[BLOCK];
};

template <typename T>
int32_t sample(const T* logits, int64_t stride, int64_t rows, int64_t vocab, const int64_t* seed,
               const int64_t* question, const int64_t* sample_number, const int64_t* position,
               const Settings& settings, int32_t* seen, int32_t isa, int64_t* token, float* policy, float* sampling) {
  if (!logits || !seed || !question || !sample_number || !position || !token || !policy || !sampling) {
    return RIL_BAD_ARGUMENT;
  }
  if (rows < 0 || vocab < 1 || vocab > std::numeric_limits<int32_t>::max() || stride < 0) return RIL_BAD_ARGUMENT;
  if (settings.top_k < 0 || !(settings.temperature > 0.0f) || !(settings.top_p > 0.0)) return RIL_BAD_ARGUMENT;
  if (!(settings.penalty > 0.0f) || isa < ISA_AUTO || isa > ISA_SCALAR) return RIL_BAD_ARGUMENT;
  const bool vectors = use_vectors(isa);
  const int64_t words = (vocab + 31) / 32;
  int32_t status = RIL_OK;
#pragma omp parallel for schedule(static) reduction(max : status)
  for (int64_t row = 0; row < rows; ++row) {
    try {
      int32_t* const own_seen = seen == nullptr ? nullptr : seen + row * words;
      Row<T> line(logits + row * stride, vocab, own_seen, settings, vectors);
      const Drawn drawn = line.draw(uniform(*seed, question[row], sample_number[row], position[row]));
      const bool valid = drawn.token >= 0;
      token[row] = valid ? drawn.token : line.lowest_allowed();
      policy[row] = valid ? static_cast<float>(line.logprob(drawn.token)) : NOT_A_NUMBER;
      sampling[row] = valid ? static_cast<float>(std::log(drawn.weight / drawn.total)) : NOT_A_NUMBER;
      if (own_seen != nullptr) own_seen[token[row] / 32] |= static_cast<int32_t>(1u << (token[row] % 32));
    } catch (const std::bad_alloc&) {  // nothing may leave the parallel region
      status = RIL_OUT_OF_MEMORY;
    }
  }
  return status;
}

}  // namespace

// Logits (rows, V) with a row stride -> a token of each row, every element written. banned and seen may be null; the
// token's bit of seen is set.
#define RIL_SAMPLE(name, type)                                                                                        \
  extern "C" RIL_EXPORT int32_t name(const void* logits, int64_t stride, int64_t rows, int64_t vocab,                 \
                                     const int64_t* seed, const int64_t* question, const int64_t* sample_number,      \
                                     const int64_t* position, float temperature, int64_t top_k, double top_p,         \
                                     float penalty, const int32_t* banned, int32_t* seen, int32_t isa,                \
                                     int64_t* token, float* policy, float* sampling) {                                \
    return sample(static_cast<const type*>(logits), stride, rows, vocab, seed, question, sample_number, position,     \
                  Settings{temperature, top_k, top_p, penalty, banned}, seen, isa, token, policy, sampling);          \
  }
RIL_SAMPLE(ril_sample_f32, float)
RIL_SAMPLE(ril_sample_bf16, Bf16)
