#include "abi.h"

extern "C" RIL_EXPORT int32_t ril_abi_version() { return RIL_ABI_VERSION; }
