#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace esper {

// Write `count` values from host memory to device memory, in the order of `stream`. The host memory is free when the call returns.
cudaError_t commit_values(int32_t* target, const int32_t* source, int64_t count, cudaStream_t stream);

}  // namespace esper
