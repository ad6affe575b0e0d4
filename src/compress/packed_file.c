#include "src/compress/packed_file.h"

#include "io/atomic_file.h"
#include "src/base/regular_file.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* As in PNG: bytes that a transfer as text, or with seven bits, would change. */
static const uint8_t magic[8] = {0x8b, 'V', 'D', 'C', '\r', '\n', 0x1a, '\n'};
enum { FORMAT = 1, FIXED = 168 /* bytes before the texts */ };

/* ---- numbers and texts of the header, one after the other ---- */

struct cursor {
  uint8_t *bytes;
  int64_t n, at; /* at > n: something was missing */
};

static uint8_t *next(struct cursor *c, int64_t n) {
  uint8_t *p = c->at <= c->n && n <= c->n - c->at ? c->bytes + c->at : NULL;
  c->at = p ? c->at + n : c->n + 1;
  return p;
}

static void put_number(struct cursor *c, int64_t value, int bytes) {
  uint8_t *p = next(c, bytes);
  for (int i = 0; i < bytes; i++) p[i] = (uint8_t)((uint64_t)value >> 8 * i);
}

static int64_t get_number(struct cursor *c, int bytes) {
  const uint8_t *p = next(c, bytes);
  uint64_t value = 0;
  for (int i = bytes - 1; p && i >= 0; i--) value = value << 8 | p[i];
  return (int64_t)value;
}

static void put_bytes(struct cursor *c, const void *from, size_t n) {
  uint8_t *p = next(c, (int64_t)n);
  if (n > 0) memcpy(p, from, n);
}

static void get_bytes(struct cursor *c, void *to, size_t n) {
  const uint8_t *p = next(c, (int64_t)n);
  if (p) memcpy(to, p, n);
}

static void put_text(struct cursor *c, const char *text) {
  put_number(c, (int64_t)strlen(text), 2);
  put_bytes(c, text, strlen(text));
}

static void get_text(struct cursor *c, char *text) {
  int64_t n = get_number(c, 2);
  memset(text, 0, VD_ENVIRONMENT_TEXT);
  if (n >= VD_ENVIRONMENT_TEXT)
    c->at = c->n + 1;
  else
    get_bytes(c, text, (size_t)n);
}

/* ---- the header ---- */

static int64_t header_size(const vd_packed *p) {
  vd_environment e = p->environment;
  int64_t n = FIXED + 2 + (int64_t)strlen(p->memory) + 8 * p->n_stream;
  for (int i = 0; i < VD_N_ENVIRONMENT; i++) n += 2 + (int64_t)strlen(vd_environment_text(&e, i, NULL));
  return n;
}

int64_t vd_packed_size(const vd_packed *p) {
  return header_size(p) + p->n_code + VD_DIGEST_SEAL;
}

static void put_header(struct cursor *c, const vd_packed *p) {
  vd_environment e = p->environment;
  put_bytes(c, magic, sizeof magic);
  put_number(c, FORMAT, 4);
  put_number(c, header_size(p), 4);
  put_number(c, p->n_byte, 8);
  put_bytes(c, p->sha256, sizeof p->sha256);
  put_bytes(c, p->checkpoint, VD_DIGEST_TEXT - 1);
  put_bytes(c, p->vocabulary, sizeof p->vocabulary);
  put_number(c, p->update, 8);
  put_number(c, p->n_stream, 4);
  put_number(c, p->group, 4);
  put_text(c, p->memory);
  for (int i = 0; i < VD_N_ENVIRONMENT; i++) put_text(c, vd_environment_text(&e, i, NULL));
  for (int64_t s = 0; s < p->n_stream; s++) put_number(c, p->length[s], 8);
}

int vd_packed_write(const vd_packed *p, const char *path, vd_error *err) {
  vd_atomic_file file;
  int fd = -1;
  struct cursor c = {.n = header_size(p)};
  c.bytes = vd_calloc((size_t)c.n, 1);
  put_header(&c, p);
  if (vd_atomic_begin(&file, path, err) == VD_OK && vd_atomic_create(&file, 0, &fd, err) == VD_OK &&
      vd_write_all(fd, path, (const char *)c.bytes, (size_t)c.n, err) == VD_OK)
    vd_write_all(fd, path, (const char *)p->code, (size_t)p->n_code, err);
  if (fd >= 0 && close(fd) != 0) vd_fail(err, VD_FAILED, "cannot close %s: %s", path, strerror(errno));
  if (err->status == VD_OK && vd_digest_seal(file.temporary, err) == VD_OK) vd_atomic_commit(&file, err);
  vd_atomic_abandon(&file);
  free(c.bytes);
  return err->status;
}

bool vd_packed_is(const char *path) {
  vd_error none = {0};
  uint8_t start[sizeof magic];
  int fd;
  if (vd_open_regular(path, &fd, NULL, &none)) return false;
  bool is = read(fd, start, sizeof start) == (ssize_t)sizeof start && memcmp(start, magic, sizeof magic) == 0;
  close(fd);
  return is;
}

static void get_header(struct cursor *c, vd_packed *p) {
  p->n_byte = get_number(c, 8);
  get_bytes(c, p->sha256, sizeof p->sha256);
  get_bytes(c, p->checkpoint, VD_DIGEST_TEXT - 1);
  get_bytes(c, p->vocabulary, sizeof p->vocabulary);
  p->update = get_number(c, 8);
  p->n_stream = get_number(c, 4);
  p->group = get_number(c, 4);
  get_text(c, p->memory);
  for (int i = 0; i < VD_N_ENVIRONMENT; i++) get_text(c, vd_environment_text(&p->environment, i, NULL));
}

/* The lengths of the codes, and the codes, which take all bytes up to the digest. */
static bool get_codes(struct cursor *c, vd_packed *p) {
  p->length = vd_calloc((size_t)p->n_stream + 1, sizeof *p->length);
  for (int64_t s = 0; s < p->n_stream; s++) {
    p->length[s] = get_number(c, 8);
    if (p->length[s] < 0 || p->length[s] > c->n) return false;
    p->n_code += p->length[s];
  }
  p->code = vd_calloc((size_t)(c->n - c->at > 0 ? c->n - c->at : 0) + 1, 1);
  if (c->at > c->n || p->n_code != c->n - c->at) return false;
  get_bytes(c, p->code, (size_t)p->n_code);
  return true;
}

static int parse(struct cursor *c, vd_packed *p, vd_error *err) {
  uint8_t start[sizeof magic] = {0};
  get_bytes(c, start, sizeof start);
  if (memcmp(start, magic, sizeof magic) != 0)
    return vd_fail(err, VD_FAILED, "is not a file that `viaduct compress` wrote");
  int64_t format = get_number(c, 4), header = get_number(c, 4);
  if (format != FORMAT)
    return vd_fail(err, VD_FAILED, "has format %lld, and this Viaduct reads format %d: take a newer one",
                   (long long)format, FORMAT);
  get_header(c, p);
  bool right = p->n_byte >= 0 && p->n_byte <= VD_PACKED_LONGEST && p->n_stream <= VD_PACKED_STREAMS &&
               p->n_stream <= p->n_byte && (p->n_stream > 0 || p->n_byte == 0) && p->group >= 1 &&
               p->group <= VD_PACKED_STREAMS && get_codes(c, p) && header == header_size(p);
  return right ? VD_OK : vd_fail(err, VD_FAILED, "has a header that contradicts itself");
}

int vd_packed_read(vd_packed *p, const char *path, vd_error *err) {
  struct cursor c = {0};
  char *bytes = NULL;
  size_t n = 0;
  *p = (vd_packed){0};
  if (vd_digest_check(path, NULL, err) || vd_read_regular(path, INT64_MAX, &bytes, &n, err)) return err->status;
  c.bytes = (uint8_t *)bytes;
  c.n = (int64_t)n - VD_DIGEST_SEAL;
  if (parse(&c, p, err)) vd_wrap(err, "%s", path);
  free(bytes);
  return err->status;
}

static void print_digest(const char *label, const uint8_t *digest) {
  printf("  %-12s ", label);
  for (int i = 0; i < VD_DIGEST_BYTES; i++) printf("%02x", digest[i]);
  printf("\n");
}

/* The lines of &memory as one. */
static void print_memory(const char *text) {
  char *safe = vd_escape(text, true), *rest = NULL;
  printf("  %-12s", "memory");
  for (char *line = strtok_r(safe, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
    printf(" %s", line + strspn(line, " "));
  printf("\n");
  free(safe);
}

void vd_packed_print(const vd_packed *p, const char *path) {
  vd_environment e = p->environment;
  printf("%s\n  %-12s packed file\n  %-12s %d\n  %-12s SHA-256 of the whole file\n", path, "kind", "format", FORMAT,
         "verified");
  printf("  %-12s %lld bytes\n", "original", (long long)p->n_byte);
  print_digest("sha256", p->sha256);
  printf("  %-12s %lld bytes, of which %lld are code", "packed", (long long)vd_packed_size(p), (long long)p->n_code);
  if (p->n_byte > 0) printf(": %.4f bits per byte", 8.0 * (double)p->n_code / (double)p->n_byte);
  printf("\n  %-12s %lld, computed in groups of %lld\n", "streams", (long long)p->n_stream, (long long)p->group);
  printf("  %-12s update %lld\n  %-12s %s\n", "checkpoint", (long long)p->update, "its sha256", p->checkpoint);
  print_digest("vocabulary", p->vocabulary);
  if (p->memory[0]) print_memory(p->memory);
  for (int i = 0; i < VD_N_ENVIRONMENT; i++) {
    const char *name, *text = vd_environment_text(&e, i, &name);
    char *safe = vd_escape(text, false);
    printf("  %-12s %s\n", name, safe);
    free(safe);
  }
}

void vd_packed_free(vd_packed *p) {
  free(p->length);
  free(p->code);
  *p = (vd_packed){0};
}
