/* deck_driver: for each file named on a line of standard input, reads the namelist groups g and h of the oracle's
 * Fortran program (tests/test_deck_oracle.py) with our reader and prints every element as that program does, or
 * "refused: MESSAGE". */
#include "src/deck/namelist.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { WIDEST = 6, STRING = 40 };

typedef struct column {
  const char *group, *name;
  char type;    /* i, r, l, s */
  int64_t size; /* 0: a scalar */
} column;

static const column columns[] = {{"g", "i1", 'i', 0}, {"g", "ia", 'i', 6}, {"g", "r1", 'r', 0}, {"g", "ra", 'r', 4},
                                 {"g", "l1", 'l', 0}, {"g", "la", 'l', 3}, {"g", "s1", 's', 0}, {"g", "sa", 's', 2},
                                 {"h", "n", 'i', 0},  {"h", "x", 'r', 0}};
enum { COLUMNS = sizeof columns / sizeof *columns };

static int print_element(const column *c, const vd_deck *deck, const vd_deck_value *v, vd_error *err) {
  int64_t whole = -1;
  double x = -1;
  bool b = false;
  uint64_t bits;
  if (c->type == 'i') {
    if (v && vd_deck_integer(v, &whole) != VD_DECK_OK) return vd_deck_fail(deck, v->at, err, "no integer");
    printf("%" PRId64 "\n", whole);
  } else if (c->type == 'r') {
    if (v && vd_deck_real(v, &x) != VD_DECK_OK) return vd_deck_fail(deck, v->at, err, "no real");
    memcpy(&bits, &x, sizeof bits);
    if (x != x) bits = 0x7FF8000000000000; /* one NaN is as good as another */
    printf("%016" PRIX64 "\n", bits);
  } else if (c->type == 'l') {
    if (v && vd_deck_logical(v, &b) != VD_DECK_OK) return vd_deck_fail(deck, v->at, err, "no logical");
    printf("%c\n", b ? 'T' : 'F');
  } else {
    if (v && (!v->quoted || v->length > STRING)) return vd_deck_fail(deck, v->at, err, "no string that fits");
    printf("[%-*s]\n", STRING, v ? v->text : "old");
  }
  return VD_OK;
}

static int print_column(const column *c, const vd_deck *deck, vd_error *err) {
  const vd_deck_value *slots[WIDEST] = {NULL};
  vd_deck_place at;
  for (size_t i = 0; i < deck->n_group; i++)
    if (strcmp(deck->groups[i].name, c->group) == 0 &&
        vd_deck_resolve(deck, &deck->groups[i], c->name, c->size, slots, &at, err))
      return err->status;
  for (int64_t i = 0; i < (c->size ? c->size : 1); i++)
    if (print_element(c, deck, slots[i], err)) return err->status;
  return VD_OK;
}

/* Unknown groups and names are the business of the deck's user: here as in Viaduct they are errors. So is the absence
 * of group g, for which gfortran would read to the end of the file. */
static int check_names(const vd_deck *deck, vd_error *err) {
  bool has_g = false;
  for (size_t i = 0; i < deck->n_group; i++) {
    const vd_deck_group *g = &deck->groups[i];
    has_g = has_g || strcmp(g->name, "g") == 0;
    if (strcmp(g->name, "g") != 0 && strcmp(g->name, "h") != 0)
      return vd_deck_fail(deck, g->at, err, "unknown group %s", g->name);
    for (size_t k = 0; k < g->n_assignment; k++) {
      const vd_deck_assignment *a = &deck->assignments[g->assignment0 + k];
      bool known = false;
      for (int c = 0; c < COLUMNS; c++)
        known = known || (strcmp(columns[c].group, g->name) == 0 && strcmp(columns[c].name, a->name) == 0);
      if (!known) return vd_deck_fail(deck, a->at, err, "unknown variable %s", a->name);
    }
  }
  return has_g ? VD_OK : vd_deck_fail(deck, (vd_deck_place){1, 1}, err, "no group g");
}

/* Many names follow each other, so that a thousand decks need one process. */
int main(void) {
  char name[1024];
  while (fgets(name, sizeof name, stdin)) {
    vd_deck *deck = NULL;
    vd_error err = {0};
    name[strcspn(name, "\n")] = 0;
    printf("deck %s\n", name);
    fflush(stdout);
    if (vd_deck_read(&deck, name, &err) == VD_OK && check_names(deck, &err) == VD_OK)
      for (int c = 0; c < COLUMNS && err.status == VD_OK; c++) print_column(&columns[c], deck, &err);
    if (err.status != VD_OK) printf("refused: %s\n", err.message);
    vd_deck_free(deck);
  }
  return 0;
}
