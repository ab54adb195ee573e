// Group advantages on the CPU. N responses, Q groups; the definition is group_advantages_reference.
#include <cmath>
#include <cstdint>
#include <new>
#include <unordered_map>
#include <vector>

#include "abi.h"

namespace {

// The order of ADVANTAGE_KINDS in reference.py.
constexpr int32_t DR_GRPO = 0;
constexpr int32_t GRPO = 1;
constexpr int32_t RLOO = 2;
constexpr double GRPO_EPSILON = 1e-4;
constexpr int64_t PARALLEL_FROM = 1 << 16;  // below it, starting threads costs more than the loop

struct Group {
  int64_t count = 0;
  double total = 0.0;
  double squares = 0.0;  // sum of squared distances from the mean
};

int32_t group_advantages(const float* rewards, const int64_t* groups, int64_t num_responses, int32_t kind,
                         float* advantages) {
  // Ids are compacted through a hash table: linear time, and no id can index out of bounds.
  std::unordered_map<int64_t, int64_t> slot_of;
  std::vector<int64_t> slots(static_cast<size_t>(num_responses));
  std::vector<Group> table;
  for (int64_t i = 0; i < num_responses; ++i) {
    const auto [entry, is_new] = slot_of.try_emplace(groups[i], static_cast<int64_t>(table.size()));
    if (is_new) table.emplace_back();
    slots[i] = entry->second;
    Group& group = table[entry->second];
    group.count += 1;
    group.total += rewards[i];  // serial and in order of arrival: the same sum on every run
  }
  for (const Group& group : table) {
    if (group.count < 2) return RIL_BAD_ARGUMENT;
  }
  if (kind == GRPO) {
    for (int64_t i = 0; i < num_responses; ++i) {
      Group& group = table[slots[i]];
      const double centred = rewards[i] - group.total / static_cast<double>(group.count);
      group.squares += centred * centred;
    }
  }

#pragma omp parallel for schedule(static) if (num_responses >= PARALLEL_FROM)
  for (int64_t i = 0; i < num_responses; ++i) {
    const Group& group = table[slots[i]];
    const double count = static_cast<double>(group.count);
    double advantage = rewards[i] - group.total / count;
    if (kind == GRPO) {
      advantage /= std::sqrt(group.squares / (count - 1.0)) + GRPO_EPSILON;
    } else if (kind == RLOO) {
      advantage = rewards[i] - (group.total - rewards[i]) / (count - 1.0);
    }
    advantages[i] = static_cast<float>(advantage);
  }
  return RIL_OK;
}

}  // namespace

extern "C" RIL_EXPORT int32_t ril_group_advantages_f32(const float* rewards,   // (N,)
                                                       const int64_t* groups,  // (N,) any ids, any order
                                                       int64_t num_responses,
                                                       int32_t kind,
                                                       float* advantages) {  // (N,) every element written
  if (rewards == nullptr || groups == nullptr || advantages == nullptr) return RIL_BAD_ARGUMENT;
  if (num_responses < 1 || kind < DR_GRPO || kind > RLOO) return RIL_BAD_ARGUMENT;
  try {
    return group_advantages(rewards, groups, num_responses, kind, advantages);
  } catch (const std::bad_alloc&) {
    return RIL_OUT_OF_MEMORY;
  } catch (...) {
    return RIL_INTERNAL_ERROR;
  }
}
