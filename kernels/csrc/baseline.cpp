// The operations for any processor.
#include <omp.h>

#define APACK_NAME(operation) operation##_baseline
#include "entry.h"
