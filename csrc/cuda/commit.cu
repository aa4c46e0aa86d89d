// The commit of a control block on a GPU: one kernel that carries the new values as its arguments.
//
// Arguments are copied when a kernel is launched. So the host may change its values again at once, and no commit overtakes another, which a
// copy from a staging buffer could not promise without events. No header of ATen: this file compiles wherever nvcc is.
#include "commit.h"

#include <algorithm>
#include <cstring>

namespace esper {
namespace {

// As many values as the arguments of a kernel may hold (4 KB), and a few for the usual commit of one dim, which is launched sooner.
template <int kMost>
struct Values {
  int32_t value[kMost];
};
constexpr int kMany = 1000;
constexpr int kFew = 8;

template <int kMost>
__global__ void write_values(int32_t* target, int count, const __grid_constant__ Values<kMost> values) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) target[i] = values.value[i];
}

template <int kMost>
cudaError_t launch(int32_t* target, const int32_t* source, int count, cudaStream_t stream) {
  Values<kMost> values;
  std::memcpy(values.value, source, count * sizeof(int32_t));
  write_values<kMost><<<1, std::min(256, (count + 31) / 32 * 32), 0, stream>>>(target, count, values);
  return cudaGetLastError();
}

}  // namespace

cudaError_t commit_values(int32_t* target, const int32_t* source, int64_t count, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (int64_t done = 0; done < count && error == cudaSuccess; done += kMany) {
    const int part = static_cast<int>(std::min<int64_t>(kMany, count - done));
    error = part <= kFew ? launch<kFew>(target + done, source + done, part, stream) : launch<kMany>(target + done, source + done, part, stream);
  }
  return error;
}

}  // namespace esper
