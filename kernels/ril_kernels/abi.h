// What every exported function shares: visibility, status codes, the ABI version.
#pragma once

#include <cstdint>

#define RIL_EXPORT __attribute__((visibility("default")))

// Raise this and ABI_VERSION in _native.py together whenever an exported signature changes.
constexpr int32_t RIL_ABI_VERSION = 5;

// Status codes; _native.py holds their meaning in words.
constexpr int32_t RIL_OK = 0;
constexpr int32_t RIL_BAD_ARGUMENT = 1;
constexpr int32_t RIL_OUT_OF_MEMORY = 2;
constexpr int32_t RIL_INTERNAL_ERROR = 3;
