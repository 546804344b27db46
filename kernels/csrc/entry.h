// One instruction set's entry points.
#include "append.h"
#include "attend.h"
#include "encode.h"
#include "unpack.h"

extern "C" int64_t APACK_NAME(apack_attend)(const void *arguments, const void *state) {
    return run_attend(*(const Attend *)arguments, *(const State *)state);
}

extern "C" int64_t APACK_NAME(apack_append)(const void *arguments) { return run_append(*(const Append *)arguments); }

extern "C" int64_t APACK_NAME(apack_unpack)(const void *arguments, const void *state) {
    return run_unpack(*(const Unpack *)arguments, *(const State *)state);
}

extern "C" int64_t APACK_NAME(apack_encode)(const void *arguments) { return run_encode(*(const Encode *)arguments); }
