/* test_psa.c - the test binary: options, list of tests, totals. The library is compiled into this file.
 *
 * build/test_psa [--list] [--filter TEXT] [--quick] [--verbose] [--seed N] [--data DIR]
 * Exit status: 0 all passed, 1 a check failed, 2 bad usage. */
#include <stdarg.h>
#include <time.h>

#define PSA_IMPLEMENTATION
#include "psa.h"

#include "test.h"

test_options test_opt = {0, 0, "tests/data", 1};

static const test_case *const tables[] = {tests_oracle, tests_golden,  tests_attend, tests_score,   tests_mask,
                                          tests_order,  tests_convert, tests_errors, tests_threads, tests_preset,
                                          tests_leaves, tests_tree,    tests_recipe};

static const char *current;
static uint64_t test_seed, state;
static int round_now, checks, failures;

/* ---- checks ---- */

enum { MAX_PRINTED = 5 }; /* per test; the rest is only counted */

int test_check(int ok, const char *file, int line, const char *expression, const char *format, ...) {
    va_list args;
    checks++;
    if (ok)
        return 1;
    if (++failures <= MAX_PRINTED) {
        printf("  %s:%d: %s round %d: %s: ", file, line, current, round_now, expression);
        va_start(args, format);
        vprintf(format, args);
        va_end(args);
        printf("\n");
    }
    return 0;
}

int test_result(psa_result got, psa_result want, const char *file, int line, const char *call) {
    return test_check(got == want, file, line, call, "got \"%s\", expected \"%s\"", psa_result_string(got),
                      psa_result_string(want));
}

int test_rounds(int n) { return test_opt.quick ? (n + 9) / 10 : n; }

/* ---- random numbers: splitmix64 ---- */

uint64_t rnd_u64(void) {
    uint64_t z = state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

void rnd_round(int round) {
    round_now = round;
    state = test_seed + (uint64_t)round * UINT64_C(0xd1342543de82ef95);
    rnd_u64();
}

double rnd_uniform(void) { return (double)(rnd_u64() >> 11) / 9007199254740992.0; }
int rnd_int(int low, int high) { return low + (int)(rnd_u64() % (uint64_t)(high - low + 1)); }
int rnd_chance(int percent) { return rnd_int(0, 99) < percent; }
double rnd_normal(void) { return sqrt(-2 * log(1 - rnd_uniform())) * cos(6.283185307179586 * rnd_uniform()); }

static uint64_t seed_of(const char *name) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325) ^ test_opt.seed;
    for (; *name; name++)
        hash = (hash ^ (unsigned char)*name) * UINT64_C(0x100000001b3);
    return hash;
}

/* ---- running ---- */

static int run_test(const test_case *test) {
    clock_t start = clock();
    current = test->name;
    test_seed = seed_of(test->name);
    checks = failures = 0;
    rnd_round(0);
    test->run();
    if (!checks)
        test_check(0, __FILE__, __LINE__, "checks > 0", "the test checked nothing");
    printf("%s %-36s %8d checks %6.2f s", failures ? "FAIL" : "ok  ", test->name, checks,
           (double)(clock() - start) / CLOCKS_PER_SEC);
    if (failures)
        printf("  %d failed, --filter %s --seed %lu", failures, test->name, (unsigned long)test_opt.seed);
    printf("\n");
    fflush(stdout);
    return failures == 0;
}

static int run_all(const char *filter, int list) {
    int passed = 0, failed = 0;
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        for (const test_case *test = tables[i]; test->name; test++) {
            if (filter && !strstr(test->name, filter))
                continue;
            if (list)
                printf("%s\n", test->name);
            else if (run_test(test))
                passed++;
            else
                failed++;
        }
    if (list)
        return 0;
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0 || passed == 0;
}

static int usage(const char *argument) {
    fprintf(stderr, "test_psa: %s: expected --list, --filter TEXT, --quick, --verbose, --seed N or --data DIR\n",
            argument);
    return 2;
}

int main(int argc, char **argv) {
    const char *filter = NULL;
    int list = 0;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(argv[i], "--list"))
            list = 1;
        else if (!strcmp(argv[i], "--quick"))
            test_opt.quick = 1;
        else if (!strcmp(argv[i], "--verbose"))
            test_opt.verbose = 1;
        else if (!strcmp(argv[i], "--filter") && value)
            filter = argv[++i];
        else if (!strcmp(argv[i], "--data") && value)
            test_opt.data = argv[++i];
        else if (!strcmp(argv[i], "--seed") && value)
            test_opt.seed = strtoul(argv[++i], NULL, 10);
        else
            return usage(argv[i]);
    }
    return run_all(filter, list);
}
