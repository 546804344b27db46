// The operations for any processor.
#define APACK_NAME(operation) operation##_baseline
#include "entry.h"
