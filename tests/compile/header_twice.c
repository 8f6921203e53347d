/* header_twice.c - the header any number of times, before, with and after its implementation. */
#include "psa.h"
#include "psa.h"
#define PSA_IMPLEMENTATION
#include "psa.h"
#include "psa.h"

#include <string.h>

int main(void) { return strcmp(psa_version(), PSA_VERSION) != 0; }
