// One instruction set's entry points.
#include "attend.h"

extern "C" int64_t APACK_NAME(apack_attend)(const void *arguments, const void *state) {
    return run_attend(*(const Attend *)arguments, *(const State *)state);
}
