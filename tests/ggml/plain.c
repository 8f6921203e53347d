/* plain.c - a program that runs attention in ggml and knows nothing of psa: what psa_preload.c is tried on.
 *
 * Prints for every flash attention node its error against attention made of other nodes, and a hash of its bits. */
#include "graph.h"

enum { CASES = 6 };

static const shape cases[CASES] = {
    {"long", GGML_TYPE_F32, 64, 64, 1560, 1560, 2, 2, 1, 1},
    {"long, f16, gqa", GGML_TYPE_F16, 64, 64, 1100, 1300, 4, 2, 1, 1},
    {"short", GGML_TYPE_F32, 64, 64, 300, 1560, 2, 2, 1, 0},
    {"few keys", GGML_TYPE_F16, 64, 64, 1560, 77, 2, 2, 1, 1},
    {"one query", GGML_TYPE_F16, 64, 64, 1, 1560, 4, 4, 1, 0},
    {"masked", GGML_TYPE_F32, 64, 64, 1100, 1100, 2, 2, 1, 0},
};

/* softmax(scale * q k^T) v by separate nodes, [Dv, H, N]. */
static struct ggml_tensor *separate_nodes(graph *g, const qkv *x) {
    struct ggml_tensor *scores = ggml_mul_mat(g->ctx, ggml_cast(g->ctx, x->k, GGML_TYPE_F32), x->q);
    scores = ggml_soft_max_ext(g->ctx, scores, NULL, scale_of(x), 0);
    struct ggml_tensor *v = ggml_cast(g->ctx, ggml_permute(g->ctx, x->v, 1, 0, 2, 3), GGML_TYPE_F32);
    return ggml_cont(g->ctx, ggml_permute(g->ctx, ggml_mul_mat(g->ctx, v, scores), 0, 2, 1, 3));
}

static void print_node(const char *name, const struct ggml_tensor *node, const struct ggml_tensor *reference) {
    float *got = values(node), *want = values(reference);
    double error = 0, size = 0;
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (int64_t i = 0; i < ggml_nelements(node); i++) {
        uint32_t bits;
        memcpy(&bits, &got[i], sizeof bits);
        hash = (hash ^ bits) * UINT64_C(0x100000001b3);
        error += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        size += (double)want[i] * (double)want[i];
    }
    printf("%s: NMSE %.1e, hash %016llx\n", name, error / size, (unsigned long long)hash);
    free(got);
    free(want);
}

static void run(int threads) {
    graph g = graph_new(threads);
    qkv x[CASES];
    struct ggml_tensor *node[CASES], *reference[CASES], *mask = NULL;
    for (int i = 0; i < CASES; i++) {
        x[i] = inputs(&g, &cases[i]);
        if (!strcmp(cases[i].name, "masked")) {
            mask = ggml_new_tensor_2d(g.ctx, GGML_TYPE_F16, cases[i].nk, cases[i].nq);
            ggml_set_input(mask);
            ggml_set_output(mask); /* nothing takes its place before the graph runs again */
        }
        node[i] = flash_attention(&g, &x[i], mask);
        reference[i] = separate_nodes(&g, &x[i]);
        graph_output(&g, node[i]);
        graph_output(&g, reference[i]);
    }
    graph_allocate(&g);
    for (int i = 0; i < CASES; i++)
        fill_inputs(&x[i]);
    void *zeros = calloc(1, ggml_nbytes(mask));
    ggml_backend_tensor_set(mask, zeros, 0, ggml_nbytes(mask));
    graph_compute(&g);
    graph_compute(&g); /* engines run their graphs many times */
    for (int i = 0; i < CASES; i++)
        print_node(cases[i].name, node[i], reference[i]);
    free(zeros);
    graph_free(&g);
}

int main(int argc, char **argv) {
    run(argc > 1 ? atoi(argv[1]) : 1);
    return 0;
}
