/* test_recipe.c */
#include "test.h"
const test_case tests_recipe[] = {
    {NULL, NULL},
};
