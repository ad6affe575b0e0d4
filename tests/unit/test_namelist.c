/* The namelist reader by itself: what it keeps, where it says things stand, and its messages. Values against gfortran's
 * reader: tests/test_deck_oracle.py. */
#include "src/deck/namelist.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static vd_deck *parse(const char *text) {
  vd_deck *deck;
  vd_error err = {0};
  if (vd_deck_parse(&deck, text, strlen(text), "t.nml", (vd_deck_place){1, 1}, &err)) fail_msg("%s", err.message);
  return deck;
}

static void expect_message(const char *text, size_t length, const char *message) {
  vd_deck *deck;
  vd_error err = {0};
  int status = vd_deck_parse(&deck, text, length, "t.nml", (vd_deck_place){1, 1}, &err);
  assert_int_equal(status, VD_USAGE);
  assert_int_equal(err.status, VD_USAGE);
  assert_string_equal(err.message, message);
  vd_deck_free(deck);
}

static void test_places(void **state) {
  (void)state;
  vd_deck *d =
      parse("! h\xC3\xA9\n &Run\n  Seed = 3,  ! c\n\ttitle='\xC3\xA9\xC3\xA9' x = 5\n/\n$data n=2*7,,2* $end\n");
  assert_int_equal(d->n_group, 2);
  assert_string_equal(d->groups[0].name, "run");
  assert_int_equal(d->groups[0].at.line, 2);
  assert_int_equal(d->groups[0].at.column, 2);
  assert_int_equal(d->groups[0].n_assignment, 3);
  assert_string_equal(d->assignments[0].name, "seed");
  assert_int_equal(d->values[0].at.line, 3);
  assert_int_equal(d->values[0].at.column, 10);
  assert_true(d->values[1].quoted);
  assert_int_equal(d->values[1].length, 4);
  assert_int_equal(d->assignments[2].at.line, 4);
  assert_int_equal(d->assignments[2].at.column, 13); /* characters, not bytes */
  const vd_deck_assignment *n = &d->assignments[3];
  assert_int_equal(n->n_value, 3);
  assert_int_equal(d->values[n->value0].repeat, 2);
  assert_string_equal(d->values[n->value0].text, "7");
  assert_true(d->values[n->value0 + 1].null);
  assert_true(d->values[n->value0 + 2].null);
  assert_int_equal(d->values[n->value0 + 2].repeat, 2);
  vd_deck_free(d);
}

static void test_strings(void **state) {
  (void)state;
  vd_deck *d = parse("\xEF\xBB\xBF&g a='it''s' b=\"q\"\"q\" c='two\r\nlines!/&' d='' /");
  const char *const want[] = {"it's", "q\"q", "twolines!/&", ""};
  assert_int_equal(d->n_value, 4);
  for (size_t i = 0; i < 4; i++) {
    assert_string_equal(d->values[i].text, want[i]);
    assert_int_equal(d->values[i].length, strlen(want[i]));
  }
  vd_deck_free(d);
}

/* CR alone, as LF and CR LF, ends a line and a comment. */
static void test_line_ends(void **state) {
  (void)state;
  static const char *const ends[] = {"\n", "\r\n", "\r"};
  for (size_t i = 0; i < 3; i++) {
    char text[128];
    snprintf(text, sizeof text, "! head%s&g a=1 ! c%s  b='x%sy'%s c=3 /! tail%s&h d=4 /", ends[i], ends[i], ends[i],
             ends[i], ends[i]);
    vd_deck *d = parse(text);
    assert_int_equal(d->n_group, 2);
    assert_int_equal(d->n_assignment, 4);
    assert_int_equal(d->groups[0].at.line, 2);
    assert_int_equal(d->assignments[1].at.line, 3);
    assert_int_equal(d->assignments[1].at.column, 3);
    assert_string_equal(d->values[1].text, "xy");
    assert_int_equal(d->assignments[2].at.line, 5);
    assert_int_equal(d->assignments[2].at.column, 2);
    assert_int_equal(d->groups[1].at.line, 6);
    vd_deck_free(d);
  }
}

static void test_resolve(void **state) {
  (void)state;
  vd_deck *d = parse("&g a(2)=1,,3 a(6:5:-1)=4,5 b=7 c=, /");
  const vd_deck_value *slots[6];
  vd_deck_place at;
  vd_error err = {0};
  assert_int_equal(vd_deck_resolve(d, &d->groups[0], "a", 6, slots, &at, &err), VD_OK);
  assert_null(slots[0]);
  assert_null(slots[2]);
  assert_string_equal(slots[1]->text, "1");
  assert_string_equal(slots[3]->text, "3");
  assert_string_equal(slots[4]->text, "5");
  assert_string_equal(slots[5]->text, "4");
  assert_int_equal(at.column, 4);
  assert_int_equal(vd_deck_resolve(d, &d->groups[0], "c", 0, slots, &at, &err), VD_OK);
  assert_null(slots[0]);
  assert_int_equal(at.column, 32);
  assert_int_equal(vd_deck_resolve(d, &d->groups[0], "z", 0, slots, &at, &err), VD_OK);
  assert_int_equal(at.line, 0);
  assert_int_equal(vd_deck_resolve(d, &d->groups[0], "a", 0, slots, &at, &err), VD_USAGE);
  assert_string_equal(err.message, "t.nml:1:4: a is a single value and takes no subscript");
  vd_deck_free(d);
}

static void test_numbers(void **state) {
  (void)state;
  int64_t whole = 5;
  double x = 5;
  bool b = false;
  vd_deck *d = parse("&g a=-9223372036854775808 9223372036854775808 3.0 5d-7 1.5+3 -nan 1e999 .tRuE. tea '3' /");
  const vd_deck_value *v = d->values;
  assert_int_equal(vd_deck_integer(&v[0], &whole), VD_DECK_OK);
  assert_true(whole == INT64_MIN);
  assert_int_equal(vd_deck_integer(&v[1], &whole), VD_DECK_OVERFLOW);
  assert_int_equal(vd_deck_integer(&v[2], &whole), VD_DECK_TYPE);
  assert_true(whole == INT64_MIN); /* untouched */
  assert_int_equal(vd_deck_real(&v[3], &x), VD_DECK_OK);
  assert_true(x == 5e-7);
  assert_int_equal(vd_deck_real(&v[4], &x), VD_DECK_OK);
  assert_true(x == 1500);
  assert_int_equal(vd_deck_real(&v[5], &x), VD_DECK_OK);
  assert_true(isnan(x));
  assert_int_equal(vd_deck_real(&v[6], &x), VD_DECK_OVERFLOW);
  assert_int_equal(vd_deck_logical(&v[7], &b), VD_DECK_OK);
  assert_true(b);
  assert_int_equal(vd_deck_logical(&v[8], &b), VD_DECK_TYPE);
  assert_int_equal(vd_deck_integer(&v[9], &whole), VD_DECK_TYPE);
  assert_int_equal(vd_deck_real(&v[9], &x), VD_DECK_TYPE);
  vd_deck_free(d);
}

static void test_messages(void **state) {
  (void)state;
  const char *const cases[][2] = {
      {"hello",
       "t.nml:1:1: \"hello\" outside of any group: a group begins with &NAME and ends with /, a comment with !"},
      {"&g a=1 /\nmore",
       "t.nml:2:1: \"more\" outside of any group: a group begins with &NAME and ends with /, a comment with "
       "!"},
      {"&g a=1", "t.nml:1:7: group &g (line 1) is not closed: expected / before the end of the text"},
      {"&g a=1\n&h /", "t.nml:2:1: group &g (line 1) is not closed: expected / before \"&h\""},
      {"&g a=1 /\n&h /\n&g /",
       "t.nml:3:1: group &g a second time (first in line 1): write its variables into one group"},
      {"&end", "t.nml:1:1: this closes a group, but none is open"},
      {"& g /", "t.nml:1:2: expected the name of a group right after '&', found \" \""},
      {"&g\n a='x\n/\n", "t.nml:2:4: the string that begins here has no closing '"},
      {"&g a='x'y /",
       "t.nml:1:9: expected a separator after the string, found \"y\" (a quote inside a string is doubled)"},
      {"&g a 3 /", "t.nml:1:6: expected '=' after the variable a, found \"3\""},
      {"&g 3=a /", "t.nml:1:4: expected the name of a variable, or / to close group &g, found \"3=a\""},
      {"&g a=0*3 /", "t.nml:1:6: a repeat count must be from 1 to 200000000, found \"0\""},
      {"&g a==3 /", "t.nml:1:6: a second '=' where a value was expected"},
      {"&g h%a=3 /", "t.nml:1:5: a variable inside a group is written without its group: no '%' here"},
      {"&g a(1,2)=3 /", "t.nml:1:7: a has more than one subscript; arrays have one dimension"},
      {"&g a()=3 /", "t.nml:1:6: a needs a subscript between its parentheses, found \")=3\""},
      {"&g a=\x01 /", "t.nml:1:6: expected a value, found the control character 1"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    expect_message(cases[i][0], strlen(cases[i][0]), cases[i][1]);
  expect_message("&g a=3\0 /", 9, "t.nml:1:7: the control character 0 in the middle of a value");
}

/* What word processors and other encodings leave is named for what it is. */
static void test_encodings(void **state) {
  (void)state;
  static const char utf16[] =
      "t.nml:1:1: this is UTF-16 text: save the deck as UTF-8 or ASCII (iconv -f UTF-16 -t UTF-8)";
  expect_message("\xFF\xFE&\0g\0 \0/\0", 10, utf16);
  expect_message("\xFE\xFF\0&\0g\0 \0/", 10, utf16);
  expect_message("&\0g\0 \0/\0", 8, utf16);
  expect_message("\0&\0g\0 \0/", 8, utf16);
  expect_message("\xFF\xFE\0\0&\0\0\0", 8,
                 "t.nml:1:1: this is UTF-32 text: save the deck as UTF-8 or ASCII (iconv -f UTF-32 -t UTF-8)");
  static const char *const cases[][2] = {
      {"&g a=\xE2\x80\x9Cx y\xE2\x80\x9D /",
       "t.nml:1:6: in a value stands U+201C, a typographic quote; a deck's strings stand in ' or \""},
      {"&g a=\xE2\x80\x98x\xE2\x80\x99 /",
       "t.nml:1:6: in a value stands U+2018, a typographic quote; a deck's strings stand in ' or \""},
      {"&g a=\x93x\x94 /", "t.nml:1:5: in a value stands the byte 0x93, in Windows-1252 a typographic quote; a deck's "
                           "strings stand in ' or \""},
      {"&g a='x\xE2\x80\x99 /\n", "t.nml:1:6: the string that begins here has no closing ': in it stands U+2019, a "
                                  "typographic quote; a deck's strings stand in ' or \""},
      {"&g a=\xE2\x88\x92"
       "3 /",
       "t.nml:1:6: in a value stands U+2212, a typographic dash; a minus sign is written -"},
      {"&g\xC2\xA0"
       "a=3 /",
       "t.nml:1:3: expected a blank after &g, found U+00A0, a blank of a word processor; write an ordinary one"},
      {"&g a='\xC3\x93 /", "t.nml:1:6: the string that begins here has no closing '"}, /* a letter, no byte 0x93 */
      {"&g a=3 /\n\xEF\xBB\xBF&h /",
       "t.nml:2:1: outside of any group stands U+FEFF, a byte order mark, which belongs at "
       "the beginning of a file only"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    expect_message(cases[i][0], strlen(cases[i][0]), cases[i][1]);
  vd_deck *d = parse("\xEF\xBB\xBF&g a='\xE2\x80\x9Cx\xE2\x80\x9D' ! \xE2\x80\x99\n /"); /* right inside strings */
  assert_string_equal(d->values[0].text, "\xE2\x80\x9Cx\xE2\x80\x9D");
  vd_deck_free(d);
}

/* Behind an error parsing takes up again where a line begins an assignment or a group. */
static void test_several_faults(void **state) {
  (void)state;
  static const char text[] = "&a x 1\n y=2 z=3=4\n  w(x)=5\n v=6\n&b s='open\n u=7 /\n stray\n t=1 /\n&c& \n &d r=8 /";
  static const struct {
    int line, column;
    const char *what;
  } wanted[] = {{1, 6, "expected '=' after the variable x"},
                {2, 9, "\"=4\" in the middle of a value"},
                {3, 5, "w needs a subscript between its parentheses"},
                {5, 1, "group &a (line 1) is not closed: expected / before \"&b\""},
                {5, 6, "the string that begins here has no closing '"},
                {7, 2, "\"stray\" outside of any group"},
                {9, 3, "expected a blank after &c"}};
  vd_deck *d;
  vd_error err = {0};
  assert_int_equal(vd_deck_parse(&d, text, strlen(text), "t.nml", (vd_deck_place){1, 1}, &err), VD_USAGE);
  for (size_t i = 0; i < d->n_fault && i < sizeof wanted / sizeof *wanted; i++) {
    if (!strstr(d->faults[i].error.message, wanted[i].what)) fail_msg("%zu: %s", i, d->faults[i].error.message);
    assert_int_equal(d->faults[i].at.line, wanted[i].line);
    assert_int_equal(d->faults[i].at.column, wanted[i].column);
  }
  assert_int_equal(d->n_fault, sizeof wanted / sizeof *wanted);
  assert_string_equal(err.message, d->faults[0].error.message);
  /* What could be parsed: y and v of a, u of b, r of d; not the assignments with errors. */
  const char *names[] = {"y", "v", "u", "r"};
  assert_int_equal(d->n_assignment, 4);
  for (int i = 0; i < 4; i++) assert_string_equal(d->assignments[i].name, names[i]);
  assert_int_equal(d->n_group, 3);
  assert_int_equal(d->groups[0].n_assignment, 2);
  assert_int_equal(d->groups[2].n_assignment, 1);
  vd_deck_free(d);
}

/* A text that is none at all ends after so many. */
static void test_many_faults(void **state) {
  (void)state;
  char text[40 * 16] = "";
  for (int i = 0; i < 40; i++) strcat(text, "&g x=1=2\n/\n");
  vd_deck *d;
  vd_error err = {0};
  assert_int_equal(vd_deck_parse(&d, text, strlen(text), "t.nml", (vd_deck_place){1, 1}, &err), VD_USAGE);
  assert_int_equal(d->n_fault, VD_DECK_FAULTS);
  vd_deck_free(d);
}

/* Every beginning of a deck is read without a fault, and only the whole of it is accepted. */
static void test_truncated(void **state) {
  (void)state;
  const char *text = "&g a(1:6:2)=2*1,,'it''s' ! c\n b=.true. /";
  for (size_t n = 1; n < strlen(text); n++) {
    vd_deck *d;
    vd_error err = {0};
    assert_int_equal(vd_deck_parse(&d, text, n, "t.nml", (vd_deck_place){1, 1}, &err), VD_USAGE);
    assert_non_null(strstr(err.message, "t.nml:"));
    vd_deck_free(d);
  }
  vd_deck_free(parse(text));
}

static void test_files(void **state) {
  (void)state;
  vd_deck *d;
  vd_error err = {0};
  assert_int_equal(vd_deck_read(&d, "/nonexistent/x.nml", &err), VD_USAGE);
  assert_string_equal(err.message, "/nonexistent/x.nml: cannot read the deck: No such file or directory");
  err = (vd_error){0};
  assert_int_equal(vd_deck_read(&d, "/", &err), VD_USAGE);
  assert_string_equal(err.message, "/: cannot read the deck: Is a directory");
  err = (vd_error){0};
  assert_int_equal(vd_deck_read(&d, "/dev/zero", &err), VD_USAGE);
  assert_string_equal(err.message, "/dev/zero: this is no deck: it is larger than 1048576 bytes");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_places),      cmocka_unit_test(test_strings),   cmocka_unit_test(test_resolve),
      cmocka_unit_test(test_numbers),     cmocka_unit_test(test_messages),  cmocka_unit_test(test_several_faults),
      cmocka_unit_test(test_many_faults), cmocka_unit_test(test_truncated), cmocka_unit_test(test_files),
      cmocka_unit_test(test_line_ends),   cmocka_unit_test(test_encodings)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
