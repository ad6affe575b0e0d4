/* `viaduct info FILE`: verifies a file of Viaduct's as far as its kind allows, and says what it holds. */
#include "io/checkpoint.h"
#include "io/corpus.h"
#include "io/digest.h"
#include "src/commands/commands.h"
#include "src/commands/info_checkpoint.h"
#include "src/commands/info_print.h"
#include "src/commands/info_run.h"
#include "src/compress/packed_file.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { PIECE = 1 << 18 }; /* values read at once */

/* Where the file is from; files of format versions 1 and 2 do not say. */
static int print_origin(hid_t file, vd_error *err) {
  int64_t ranks, threads;
  if (vd_info_optional_text(file, "title", "title", err) || vd_info_optional_text(file, "hosts", "hosts", err) ||
      vd_info_optional_text(file, "devices", "devices", err) ||
      vd_info_optional_text(file, "precision", "precision", err))
    return err->status;
  if (H5Aexists(file, "ranks") > 0 && H5Aexists(file, "threads") > 0 &&
      vd_h5_get_i64(file, "ranks", &ranks, err) == VD_OK && vd_h5_get_i64(file, "threads", &threads, err) == VD_OK)
    printf("  %-12s %lld, of %lld threads each\n", "ranks", (long long)ranks, (long long)threads);
  return err->status;
}

/* The lines that every kind has. */
static int print_head(hid_t file, const char *path, const char *kind, const char *verified, vd_error *err) {
  int64_t format;
  if (vd_h5_format(file, &format, err)) return err->status;
  printf("%s\n  %-12s %s\n  %-12s %lld\n", path, "kind", kind, "format", (long long)format);
  if (vd_info_text(file, "viaduct_version", "version", err) || vd_info_text(file, "git_version", "commit", err) ||
      vd_info_text(file, "created", "created", err) || print_origin(file, err))
    return err->status;
  printf("  %-12s %s\n", "verified", verified);
  return VD_OK;
}

/* Number of rows of a dataset. */
static int rows_of(hid_t file, const char *path, int64_t *n, vd_error *err) {
  char shape[96];
  hid_t id;
  if (vd_h5_open_dataset(file, path, &id, err)) return err->status;
  hsize_t dims[H5S_MAX_RANK] = {0};
  hid_t space = H5Dget_space(id);
  vd_info_shape(id, shape);
  if (H5Sget_simple_extent_dims(space, dims, NULL) < 1) vd_fail(err, VD_FAILED, "%s is a scalar: %s", path, shape);
  *n = (int64_t)dims[0];
  H5Sclose(space);
  H5Dclose(id);
  return err->status;
}

/* Reads values [first, first + n) of a dataset of rank 1 as float64. */
static int read_values(hid_t file, const char *path, int64_t first, int64_t n, double *out, vd_error *err) {
  hid_t id;
  if (vd_h5_open_dataset(file, path, &id, err)) return err->status;
  hsize_t start = (hsize_t)first, count = (hsize_t)n;
  hid_t memory = H5Screate_simple(1, &count, NULL), space = H5Dget_space(id);
  if (H5Sget_simple_extent_ndims(space) != 1 ||
      H5Sselect_hyperslab(space, H5S_SELECT_SET, &start, NULL, &count, NULL) < 0 ||
      H5Dread(id, H5T_NATIVE_DOUBLE, memory, space, H5P_DEFAULT, out) < 0)
    vd_h5_fail(err, "%s is damaged or of another shape at values %lld to %lld", path, (long long)first,
               (long long)(first + n));
  H5Sclose(space);
  H5Sclose(memory);
  H5Dclose(id);
  return err->status;
}

/* Reads a whole dataset of rank 1, and so has HDF5 compare its checksums: how many values, how many of them are
 * numbers, and the sum of these. */
static int read_through(hid_t file, const char *path, int64_t *n, int64_t *numbers, double *sum, vd_error *err) {
  *numbers = 0;
  *sum = 0;
  if (rows_of(file, path, n, err)) return err->status;
  double *value = vd_calloc(PIECE, sizeof *value);
  for (int64_t at = 0; at < *n && err->status == VD_OK; at += PIECE) {
    int64_t some = *n - at < PIECE ? *n - at : PIECE;
    if (read_values(file, path, at, some, value, err)) break;
    for (int64_t i = 0; i < some; i++) {
      *numbers += !isnan(value[i]);
      *sum += isnan(value[i]) ? 0.0 : value[i];
    }
  }
  free(value);
  return err->status;
}

static int info_shard(hid_t file, const char *path, vd_error *err) {
  int64_t n, numbers, first;
  double sum;
  if (read_through(file, "/tokens", &n, &numbers, &sum, err) ||
      print_head(file, path, "shard", "the checksums of all tokens (fletcher32)", err))
    return err->status;
  if (vd_info_text(file, "corpus_id", "corpus id", err) || vd_info_text(file, "split", "split", err) ||
      vd_h5_get_i64(file, "first_token", &first, err))
    return err->status;
  printf("  %-12s %lld, from token %lld of the split on\n", "tokens", (long long)n, (long long)first);
  return VD_OK;
}

/* Prints the checkpoint and the split of a file that eval wrote. */
static int print_eval_source(hid_t file, vd_error *err) {
  int64_t update;
  if (vd_info_text(file, "corpus_id", "corpus id", err) || vd_info_text(file, "split", "split", err) ||
      vd_info_text(file, "checkpoint", "checkpoint", err) ||
      vd_info_optional_text(file, "checkpoint_sha256", "its sha256", err))
    return err->status;
  if (H5Aexists(file, "checkpoint_update") > 0 && vd_h5_get_i64(file, "checkpoint_update", &update, err) == VD_OK)
    printf("  %-12s %lld\n", "its update", (long long)update);
  return err->status;
}

static int info_nll(hid_t file, const char *path, vd_error *err) {
  int64_t n, numbers;
  double sum;
  if (read_through(file, "/nll", &n, &numbers, &sum, err) ||
      print_head(file, path, "nll", "the checksums of all values (fletcher32)", err))
    return err->status;
  if (print_eval_source(file, err)) return err->status;
  printf("  %-12s %lld, of which %lld were predicted\n", "tokens", (long long)n, (long long)numbers);
  if (numbers > 0) printf("  %-12s %.4f bits per symbol\n", "bpc", sum / (double)numbers / M_LN2);
  return VD_OK;
}

/* Reads a plane, all of the last two dimensions of a dataset of rank 3 or 4, as float64; index: the place in the
 * dimensions before them. */
static int read_plane(hid_t id, const char *path, int rank, const hsize_t *shape, hsize_t index, double *out,
                      vd_error *err) {
  hsize_t start[4] = {0}, count[4] = {1, 1, 1, 1};
  start[0] = rank == 4 ? index / shape[1] : index;
  if (rank == 4) start[1] = index % shape[1];
  for (int i = rank - 2; i < rank; i++) count[i] = shape[i];
  hid_t memory = H5Screate_simple(rank, count, NULL), space = H5Dget_space(id);
  if (H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL) < 0 ||
      H5Dread(id, H5T_NATIVE_DOUBLE, memory, space, H5P_DEFAULT, out) < 0)
    vd_h5_fail(err, "%s is damaged", path);
  H5Sclose(space);
  H5Sclose(memory);
  return err->status;
}

/* Reads a dataset of weights plane by plane, so that HDF5 compares its checksums. Its shape goes to shape, and the
 * mean distance of each head of the planes, weighted, to *distance [planes][heads], which the caller frees. */
static int read_weights(hid_t file, const char *path, int rank, hsize_t shape[4], double **distance, vd_error *err) {
  hid_t id;
  int found;
  if (vd_h5_open_dataset(file, path, &id, err)) return err->status;
  if (vd_h5_shape(id, path, &found, shape, err) == VD_OK && found != rank)
    vd_fail(err, VD_FAILED, "%s has %d dimensions instead of %d", path, found, rank);
  for (int i = 0; i < rank && err->status == VD_OK; i++)
    if (shape[i] == 0) vd_fail(err, VD_FAILED, "%s has no values", path);
  if (err->status == VD_OK) {
    hsize_t heads = shape[rank - 2], n = shape[rank - 1], planes = rank == 4 ? shape[0] * shape[1] : shape[0];
    double *plane = vd_calloc(heads * n + 1, sizeof *plane);
    *distance = vd_calloc(planes * heads + 1, sizeof **distance);
    for (hsize_t i = 0; i < planes && read_plane(id, path, rank, shape, i, plane, err) == VD_OK; i++)
      for (hsize_t h = 0; h < heads; h++) {
        double sum = 0, far = 0;
        for (hsize_t x = 0; x < n; x++) {
          sum += plane[h * n + x];
          far += plane[h * n + x] * (double)x;
        }
        (*distance)[i * heads + h] = far / sum;
      }
    free(plane);
  }
  H5Dclose(id);
  return err->status;
}

static int info_attention(hid_t file, const char *path, vd_error *err) {
  hsize_t shape[4] = {0}, positions[4] = {0};
  double *distance = NULL, *unused = NULL;
  if (read_weights(file, "/distance_weight", 3, shape, &distance, err) == VD_OK &&
      H5Lexists(file, "/position_weight", H5P_DEFAULT) > 0)
    read_weights(file, "/position_weight", 4, positions, &unused, err);
  if (err->status == VD_OK &&
      print_head(file, path, "attention", "the checksums of all weights (fletcher32)", err) == VD_OK &&
      print_eval_source(file, err) == VD_OK) {
    printf("  %-12s %llu layers, %llu heads, distances 0 to %llu, %llu positions\n", "weights",
           (unsigned long long)shape[0], (unsigned long long)shape[1], (unsigned long long)shape[2] - 1,
           (unsigned long long)positions[0]);
    printf("  mean distance that each head attends to, tokens\n");
    for (hsize_t l = 0; l < shape[0]; l++) {
      printf("    layer %2llu ", (unsigned long long)l);
      for (hsize_t h = 0; h < shape[1]; h++) printf(" %.1f", distance[l * shape[1] + h]);
      printf("\n");
    }
  }
  free(distance);
  free(unused);
  return err->status;
}

/* One source file of a corpus; `of` is "" or "_train" ... */
static int print_source(hid_t file, const char *of, vd_error *err) {
  char key[64];
  char *name = NULL, *md5 = NULL;
  int64_t bytes;
  snprintf(key, sizeof key, "source%s", of);
  vd_h5_get_text(file, key, &name, err);
  snprintf(key, sizeof key, "source%s_md5", of);
  if (err->status == VD_OK) vd_h5_get_text(file, key, &md5, err);
  snprintf(key, sizeof key, "source%s_bytes", of);
  if (err->status == VD_OK && vd_h5_get_i64(file, key, &bytes, err) == VD_OK)
    printf("  %-12s %s, %lld bytes, md5 %s\n", "source", name, (long long)bytes, md5);
  free(name);
  free(md5);
  return err->status;
}

/* Reads a split through, so that the checksums of its shards are compared. */
static int verify_split(vd_corpus *corpus, const char *split, int64_t n, vd_error *err) {
  int32_t *token = vd_calloc(PIECE, sizeof *token);
  for (int64_t at = 0; at < n && err->status == VD_OK; at += PIECE)
    vd_corpus_read(corpus, split, at, n - at < PIECE ? n - at : PIECE, token, err);
  free(token);
  return err->status;
}

static int print_corpus(hid_t file, vd_corpus *corpus, const char *const *splits, const int64_t *n, vd_error *err) {
  int64_t shard_tokens;
  if (vd_info_text(file, "corpus_id", "corpus id", err) || vd_h5_get_i64(file, "shard_tokens", &shard_tokens, err))
    return err->status;
  if (H5Aexists(file, "source") > 0) {
    if (print_source(file, "", err)) return err->status;
  } else if (print_source(file, "_train", err) || print_source(file, "_valid", err) ||
             print_source(file, "_test", err)) {
    return err->status;
  }
  if (vd_info_text(file, "split_rule", "split rule", err) || vd_info_text(file, "symbols", "symbols", err))
    return err->status;
  printf("  %-12s %lld symbols\n", "vocabulary", (long long)vd_corpus_vocab(corpus));
  for (int i = 0; i < 3; i++)
    printf("  %-12s %lld tokens in %lld shards of %lld at most\n", splits[i], (long long)n[i],
           (long long)((n[i] + shard_tokens - 1) / shard_tokens), (long long)shard_tokens);
  return vd_info_settings(file, err);
}

static int info_corpus(vd_h5 *h5, hid_t file, const char *path, vd_error *err) {
  static const char *const splits[3] = {"train", "valid", "test"};
  int64_t n[3];
  vd_corpus *corpus;
  if (vd_corpus_open(&corpus, h5, path, err)) return err->status;
  for (int i = 0; i < 3 && err->status == VD_OK; i++)
    if (vd_corpus_length(corpus, splits[i], &n[i], err) == VD_OK) verify_split(corpus, splits[i], n[i], err);
  if (err->status == VD_OK &&
      print_head(file, path, "corpus", "SHA-256 of this file; the checksums of all tokens of all shards (fletcher32)",
                 err) == VD_OK)
    print_corpus(file, corpus, splits, n, err);
  vd_corpus_close(corpus);
  return err->status;
}

/* The spans of the last row. */
static int print_last_spans(hid_t file, int64_t rows, vd_error *err) {
  hid_t id;
  if (vd_h5_open_dataset(file, "/span", &id, err)) return err->status;
  hsize_t shape[3] = {0}, start[3] = {(hsize_t)rows - 1, 0, 0}, count[3] = {1, 0, 0};
  hid_t space = H5Dget_space(id), memory = H5I_INVALID_HID;
  double *span = NULL;
  if (H5Sget_simple_extent_ndims(space) == 3 && H5Sget_simple_extent_dims(space, shape, NULL) == 3) {
    count[1] = shape[1];
    count[2] = shape[2];
    memory = H5Screate_simple(3, count, NULL);
    span = vd_calloc(shape[1] * shape[2], sizeof *span);
  }
  bool is_read = span && H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL) >= 0 &&
                 H5Dread(id, H5T_NATIVE_DOUBLE, memory, space, H5P_DEFAULT, span) >= 0;
  if (is_read)
    printf("  spans of the last row, tokens\n");
  else
    vd_h5_fail(err, "cannot read the last row of /span");
  for (hsize_t l = 0; is_read && l < shape[1]; l++) {
    printf("    layer %2llu ", (unsigned long long)l);
    for (hsize_t h = 0; h < shape[2]; h++) printf(" %.1f", span[l * shape[2] + h]);
    printf("\n");
  }
  free(span);
  if (memory >= 0) H5Sclose(memory);
  H5Sclose(space);
  H5Dclose(id);
  return err->status;
}

static int info_trace(hid_t file, bool sealed, const char *path, vd_error *err) {
  static const char *const columns[5] = {"/update", "/train_bpc", "/learning_rate", "/grad_norm", "/tokens_per_second"};
  static const char *const names[5] = {"update", "bpc", "learning rate", "gradient norm", "tokens/s"};
  int64_t rows, valid;
  if (print_head(file, path, "trace", sealed ? "SHA-256 of the whole file" : "its structure only: it has no digest",
                 err) ||
      rows_of(file, "/update", &rows, err) || rows_of(file, "/valid/update", &valid, err))
    return err->status;
  printf("  %-12s %lld\n", "rows", (long long)rows);
  for (int i = 0; i < 5 && rows > 0; i++) {
    double value;
    if (read_values(file, columns[i], rows - 1, 1, &value, err)) return err->status;
    printf("    last %-14s %.8g\n", names[i], value);
  }
  printf("  %-12s %lld\n", "validations", (long long)valid);
  if (valid > 0) {
    double update, bpc;
    if (read_values(file, "/valid/update", valid - 1, 1, &update, err) ||
        read_values(file, "/valid/bpc", valid - 1, 1, &bpc, err))
      return err->status;
    printf("    last: update %.0f, bpc %.4f\n", update, bpc);
  }
  if (rows > 0 && print_last_spans(file, rows, err)) return err->status;
  return vd_info_settings(file, err);
}

/* An open file whose kind is `kind`. `sealed`: it ends with a digest, which is right. */
static int info_kind(vd_h5 *h5, hid_t file, const char *kind, bool sealed, const char *path, vd_error *err) {
  bool wants_seal = strcmp(kind, "checkpoint") == 0 || strcmp(kind, "corpus") == 0;
  if (wants_seal && !sealed)
    return vd_fail(err, VD_FAILED, "a %s ends with a digest, this file does not: it is truncated or damaged", kind);
  if (strcmp(kind, "checkpoint") == 0)
    return print_head(file, path, kind, "SHA-256 of the whole file", err) ? err->status
                                                                          : vd_info_checkpoint(file, path, err);
  if (strcmp(kind, "corpus") == 0) return info_corpus(h5, file, path, err);
  if (strcmp(kind, "shard") == 0) return info_shard(file, path, err);
  if (strcmp(kind, "nll") == 0) return info_nll(file, path, err);
  if (strcmp(kind, "attention") == 0) return info_attention(file, path, err);
  if (strcmp(kind, "trace") == 0) return info_trace(file, sealed, path, err);
  return vd_fail(err, VD_FAILED, "files of kind '%s' are not known to this Viaduct", kind);
}

static int info_packed(const char *path, vd_error *err) {
  vd_packed packed;
  if (vd_packed_read(&packed, path, err) == VD_OK) vd_packed_print(&packed, path);
  vd_packed_free(&packed);
  return err->status;
}

int vd_cmd_info(vd_context *ctx, const char *path, vd_error *err) {
  bool sealed;
  vd_error seal = {0};
  char *kind = NULL;
  hid_t file;
  struct stat info;
  if (stat(path, &info) == 0 && S_ISDIR(info.st_mode)) return vd_info_run(path, err);
  if (vd_packed_is(path)) return info_packed(path, err);
  /* A file with a digest that is wrong is not given to HDF5 at all. */
  if (vd_digest_check(path, &sealed, &seal) && sealed) {
    *err = seal;
    return err->status;
  }
  vd_h5_lock(ctx->h5);
  if (vd_h5_open(path, NULL, &file, err) == VD_OK) {
    if (vd_h5_get_text(file, "viaduct_kind", &kind, err) == VD_OK) info_kind(ctx->h5, file, kind, sealed, path, err);
    free(kind);
    H5Fclose(file);
    if (err->status) vd_wrap(err, "%s", path);
  }
  vd_h5_unlock(ctx->h5);
  return err->status;
}
