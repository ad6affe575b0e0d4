#include "src/commands/source_kind.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static const struct magic {
  const char *name;
  enum vd_packing packing;
  size_t n;
  const char *bytes;
} magics[] = {
    {"gzip", VD_PACKING_GZIP, 2, "\x1f\x8b"},
    {"zip", VD_PACKING_ZIP, 4, "PK\3\4"},
    {"zip", VD_PACKING_ZIP, 4, "PK\5\6"}, /* without a member */
    {"xz", VD_PACKING_FILTER, 6, "\xfd\x37zXZ\0"},
    {"zstd", VD_PACKING_FILTER, 4, "\x28\xb5\x2f\xfd"},
    {"lz4", VD_PACKING_FILTER, 4, "\x04\x22\x4d\x18"},
    {"bzip2", VD_PACKING_FILTER, 0, NULL}, /* see is_bzip2() */
    {"lzma", VD_PACKING_FILTER, 0, NULL},  /* see is_lzma() */
    {"lz4 (of an old format)", VD_PACKING_REFUSED, 4, "\x02\x21\x4c\x18"},
    {"zip (of several parts)", VD_PACKING_REFUSED, 4, "PK\7\10"},
    {"compress (.Z)", VD_PACKING_REFUSED, 2, "\x1f\x9d"},
    {"7z", VD_PACKING_REFUSED, 6, "7z\xbc\xaf\x27\x1c"},
    {"rar", VD_PACKING_REFUSED, 6, "Rar!\x1a\7"},
    {"lzip", VD_PACKING_REFUSED, 4, "LZIP"},
    {"lzop", VD_PACKING_REFUSED, 5, "\x89LZO\0"},
    {"lrzip", VD_PACKING_REFUSED, 4, "LRZI"},
    {"cabinet", VD_PACKING_REFUSED, 8, "MSCF\0\0\0\0"},
    {"xar", VD_PACKING_REFUSED, 5, "xar!\0"},
    {"rpm", VD_PACKING_REFUSED, 4, "\xed\xab\xee\xdb"},
    {"snappy", VD_PACKING_REFUSED, 10, "\xff\6\0\0sNaPpY"},
    {"cpio", VD_PACKING_REFUSED, 6, "070701"},
    {"cpio", VD_PACKING_REFUSED, 6, "070707"},
    {"ar", VD_PACKING_REFUSED, 8, "!<arch>\n"},
};

static bool is_bzip2(const uint8_t *head, size_t n) {
  return n >= 10 && memcmp(head, "BZh", 3) == 0 && head[3] >= '1' && head[3] <= '9' &&
         (memcmp(head + 4, "\x31\x41\x59\x26\x53\x59", 6) == 0 || memcmp(head + 4, "\x17\x72\x45\x38\x50\x90", 6) == 0);
}

/* The format has no magic number: the usual properties, a dictionary of 2^i or 2^i + 2^(i-1) bytes, a possible size. */
static bool is_lzma(const uint8_t *head, size_t n) {
  if (n < 13 || head[0] != 0x5d) return false;
  uint32_t dictionary = 0;
  for (int i = 0; i < 4; i++) dictionary |= (uint32_t)head[1 + i] << 8 * i;
  uint64_t size = 0;
  for (int i = 0; i < 8; i++) size |= (uint64_t)head[5 + i] << 8 * i;
  uint32_t low = dictionary & (~dictionary + 1), rest = dictionary ^ low;
  bool is_power = low >= 4096 && (rest == 0 || rest == low << 1 || dictionary == UINT32_MAX);
  return is_power && (size == UINT64_MAX || size < (uint64_t)1 << 38);
}

/* Any tar: the checksum of the first header. */
static bool is_tar(const uint8_t *head, size_t n) {
  if (n < 512 || head[0] == '\0') return false;
  char field[9] = "";
  memcpy(field, head + 148, 8);
  char *end;
  long wanted = strtol(field, &end, 8), sum = 0;
  for (size_t i = 0; i < 512; i++) sum += i >= 148 && i < 156 ? ' ' : head[i];
  return end != field && sum == wanted;
}

vd_source_kind vd_source_kind_of(const uint8_t *head, size_t n) {
  for (size_t i = 0; i < sizeof magics / sizeof *magics; i++) {
    const struct magic *m = &magics[i];
    bool found = m->n > 0                        ? n >= m->n && memcmp(head, m->bytes, m->n) == 0
                 : strcmp(m->name, "bzip2") == 0 ? is_bzip2(head, n)
                                                 : is_lzma(head, n);
    if (found) return (vd_source_kind){m->name, m->packing};
  }
  /* Frames 0x50 to 0x5f, which hold what the packer's user wants. */
  if (n >= 4 && head[0] >> 4 == 5 && memcmp(head + 1, "\x2a\x4d\x18", 3) == 0)
    return (vd_source_kind){"zstd or lz4 (a skippable frame)", VD_PACKING_REFUSED};
  if (is_tar(head, n)) return (vd_source_kind){"tar", VD_PACKING_REFUSED};
  return (vd_source_kind){"plain", VD_PACKING_NONE};
}
