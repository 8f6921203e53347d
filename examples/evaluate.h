/* evaluate.h - accuracy on a list of labelled videos: CSV lines of path,label. Further columns are not read, nor are
 * empty lines and lines that begin with #. A label is the config's text or its number. */
#ifndef EVALUATE_H
#define EVALUATE_H

typedef struct sample {
    char *path;
    int label;
} sample;

/* What has been counted so far; [0] of a pair: as asked for, [1]: dense, with --compare. */
typedef struct tally {
    int seen, unread;       /* unread: videos that cannot be read */
    int top1[2], top5[2];
    int gained, lost;       /* right where the dense answer is wrong, and the reverse */
    int agree;
    double kl, density, seconds[2], attention[2], start, shown;
} tally;

/* ---- lists ------------------------------------------------------------------------------------------------------ */

/* The next field of a CSV line into text, its quotes removed; returns what follows it, NULL at the end of the line. */
static const char *csv_field(const char *line, char *text, size_t size) {
    size_t n = 0;
    int quoted = *line == '"';
    for (line += quoted; *line && (quoted || *line != ','); line++) {
        if (quoted && *line == '"' && *++line != '"') break;
        if (n + 1 < size) text[n++] = *line;
    }
    text[n] = 0;
    return *line == ',' ? line + 1 : NULL;
}

/* -1 if the model has no such label. */
static int find_label(const model *m, const char *text) {
    char *end;
    for (int i = 0; i < m->n_labels; i++)
        if (strcmp(m->labels[i], text) == 0) return i;
    long i = strtol(text, &end, 10);
    return *text && !*end && i >= 0 && i < m->n_labels ? (int)i : -1;
}

static char *root_of(const arguments *in) {
    const char *slash = strrchr(in->eval, '/');
    if (in->root) return copy_text(in->root);
    char *root = copy_text(slash ? in->eval : ".");
    if (slash) root[slash - in->eval] = 0;
    return root;
}

static sample *read_list(const job *j, int *n) {
    char line[8192], path[4096], label[4096], *root = root_of(&j->in);
    sample *samples = NULL;
    FILE *f = open_file(j->in.eval);
    *n = 0;
    for (int number = 1; fgets(line, sizeof line, f) && (!j->in.limit || *n < j->in.limit); number++) {
        line[strcspn(line, "\r\n")] = 0;
        if (!*line || *line == '#') continue;
        const char *rest = csv_field(line, path, sizeof path);
        if (!rest) die("%s: line %d: expected path,label", j->in.eval, number);
        csv_field(rest, label, sizeof label);
        samples = grow(samples, (size_t)*n, sizeof *samples);
        sample s = {*path == '/' ? copy_text(path) : join_path(root, path), find_label(&j->m, label)};
        if (s.label < 0) die("%s: line %d: \"%s\" is not a label of the model", j->in.eval, number, label);
        samples[(*n)++] = s;
    }
    if (ferror(f)) die("%s: %s", j->in.eval, strerror(errno));
    if (*n == 0) die("%s: the list is empty", j->in.eval);
    fclose(f);
    free(root);
    return samples;
}

/* ---- counting --------------------------------------------------------------------------------------------------- */

static void count_outcome(tally *t, int which, const outcome *o, int label) {
    t->top1[which] += o->top[0] == label;
    for (int i = 0; i < TOP; i++) t->top5[which] += o->top[i] == label;
    t->seconds[which] += o->seconds;
    t->attention[which] += o->parts[ATTENTION];
}

static void count(tally *t, const job *j, const result *r, int label) {
    t->seen++;
    count_outcome(t, 0, &r->main, label);
    t->density += r->main.density;
    if (!j->in.psa.compare) return;
    count_outcome(t, 1, &r->dense, label);
    int right = r->main.top[0] == label, dense = r->dense.top[0] == label;
    t->gained += right && !dense;
    t->lost += dense && !right;
    t->agree += r->main.top[0] == r->dense.top[0];
    t->kl += divergence(r, j->m.n_labels);
}

/* Wilson's 95 % interval of a share of n. */
static void interval(int part, int n, double ends[2]) {
    const double z = 1.959964;
    double p = (double)part / n, middle = p + z * z / (2 * n), half = z * sqrt(p * (1 - p) / n + z * z / (4.0 * n * n));
    ends[0] = (middle - half) / (1 + z * z / n);
    ends[1] = (middle + half) / (1 + z * z / n);
}

/* Half the 95 % interval of the difference in top-1 on the same clips. */
static double difference_interval(const tally *t) {
    double n = t->seen, d = (t->gained - t->lost) / n;
    return 1.959964 * sqrt(fmax(0, (t->gained + t->lost) / n - d * d) / n);
}

/* Where a person is looking. */
static void show_progress_bar(tally *t, int n) {
    int done = t->seen + t->unread;
    char bar[31] = "..............................";
    double elapsed = now() - t->start, left = done ? elapsed * (n - done) / done : 0;
    if (!isatty(STDERR_FILENO) || (now() - t->shown < 0.2 && done < n)) return;
    t->shown = now();
    memset(bar, '#', (size_t)(30.0 * done / n));
    fprintf(stderr, "\r%s %d/%d  top-1 %.1f %%  %.2f clips/s  %d:%02d left \033[K%s", bar, done, n,
            t->seen ? 100.0 * t->top1[0] / t->seen : 0, done / elapsed, (int)left / 60, (int)left % 60,
            done == n ? "\n" : "");
}

/* ---- report ----------------------------------------------------------------------------------------------------- */

static void print_tally_row(const tally *t, int which, const char *name, double density) {
    double top1[2], top5[2];
    interval(t->top1[which], t->seen, top1);
    interval(t->top5[which], t->seen, top5);
    printf("%-8s %8.3f   %6.2f (%6.2f to %6.2f)   %6.2f (%6.2f to %6.2f)   %9.1f ms   %9.1f ms\n", name, density,
           100.0 * t->top1[which] / t->seen, 100 * top1[0], 100 * top1[1], 100.0 * t->top5[which] / t->seen,
           100 * top5[0], 100 * top5[1], 1e3 * t->attention[which] / t->seen, 1e3 * t->seconds[which] / t->seen);
}

static void print_tally(const job *j, const tally *t) {
    double elapsed = now() - t->start;
    print_header(j);
    printf("%s: %d clips in %.0f s, %.2f a second", j->in.eval, t->seen, elapsed, t->seen / elapsed);
    if (t->unread) printf("; %d could not be read", t->unread);
    printf("\n%17s   %-25s   %-25s   %12s   %12s\n", "density", "top-1, % (95 % interval)", "top-5, % (95 % interval)",
           "attention", "total a clip");
    print_tally_row(t, 0, main_name(j), t->density / t->seen);
    if (!j->in.psa.compare) return;
    print_tally_row(t, 1, "dense", 1);
    printf("top-1 agrees on %.2f %%; psa - dense %+.2f points (+- %.2f); KL(dense || psa) %.3g nats\n"
           "attention %.2f times as fast, all %.2f times\n", 100.0 * t->agree / t->seen,
           100.0 * (t->gained - t->lost) / t->seen, 100 * difference_interval(t), t->kl / t->seen,
           t->attention[1] / t->attention[0], t->seconds[1] / t->seconds[0]);
}

static void json_tally_row(cJSON *parent, const tally *t, int which, const char *name, double density) {
    cJSON *object = cJSON_AddObjectToObject(parent, name);
    double top1[2], top5[2];
    interval(t->top1[which], t->seen, top1);
    interval(t->top5[which], t->seen, top5);
    cJSON_AddNumberToObject(object, "density", density);
    cJSON_AddNumberToObject(object, "top1", (double)t->top1[which] / t->seen);
    cJSON_AddItemToObject(object, "top1_interval", cJSON_CreateDoubleArray(top1, 2));
    cJSON_AddNumberToObject(object, "top5", (double)t->top5[which] / t->seen);
    cJSON_AddItemToObject(object, "top5_interval", cJSON_CreateDoubleArray(top5, 2));
    cJSON_AddNumberToObject(object, "attention_seconds", t->attention[which] / t->seen);
    cJSON_AddNumberToObject(object, "seconds", t->seconds[which] / t->seen);
}

static void print_tally_json(const job *j, const tally *t) {
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "model", j->in.model);
    cJSON_AddStringToObject(root, "list", j->in.eval);
    cJSON_AddNumberToObject(root, "threads", j->crew.n_threads);
    cJSON_AddNumberToObject(root, "clips", t->seen);
    cJSON_AddNumberToObject(root, "unread", t->unread);
    cJSON_AddNumberToObject(root, "clips_per_second", t->seen / (now() - t->start));
    json_tally_row(root, t, 0, main_name(j), t->density / t->seen);
    if (j->in.psa.compare) {
        json_tally_row(root, t, 1, "dense", 1);
        cJSON_AddNumberToObject(root, "agreement", (double)t->agree / t->seen);
        cJSON_AddNumberToObject(root, "difference", (double)(t->gained - t->lost) / t->seen);
        cJSON_AddNumberToObject(root, "difference_interval", difference_interval(t));
        cJSON_AddNumberToObject(root, "kl", t->kl / t->seen);
    }
    print_and_delete(root);
}

/* Returns the exit status: 2 if a video could not be read. */
static int evaluate(job *j) {
    int n, labels = j->m.n_labels;
    char error[512];
    tally t;
    sample *samples = read_list(j, &n);
    float *logits = j->in.logits ? alloc((size_t)n * (size_t)labels, sizeof *logits) : NULL;
    memset(&t, 0, sizeof t);
    t.start = now();
    for (int i = 0; i < n; i++) {
        result r;
        memset(&r, 0, sizeof r);
        r.name = samples[i].path;
        if (run_video(j, r.name, &r, error, sizeof error) == 0) {
            count(&t, j, &r, samples[i].label);
        } else {
            fprintf(stderr, "%sclassify: %s\n", isatty(STDERR_FILENO) ? "\r\033[K" : "", error);
            t.unread++;
        }
        for (int l = 0; logits && l < labels; l++)
            logits[(size_t)i * (size_t)labels + (size_t)l] = r.main.logits ? r.main.logits[l] : NAN;
        result_free(&r);
        show_progress_bar(&t, n);
    }
    free(samples);
    if (!t.seen) die("%s: no video of the list could be read", j->in.eval);
    if (logits) write_logits(j->in.logits, n, labels, logits);
    free(logits);
    if (j->in.psa.json)
        print_tally_json(j, &t);
    else
        print_tally(j, &t);
    return t.unread ? 2 : 0;
}

#endif
