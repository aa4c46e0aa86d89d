// The schemas of the library's ops: every op is declared here, and implemented in the file that bears its name.

#include <torch/library.h>

TORCH_LIBRARY(esper_elastic, m) {}
