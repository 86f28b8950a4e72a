/* A transfer's runs in the order of their destinations, those joined that touch on both sides. */

#include "native.h"

#include <stdlib.h>
#include <string.h>

enum { DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS };

struct entry {
    uint64_t key;
    uint64_t run;
};

static bool in_order(const uint64_t *keys, size_t count)
{
    for (size_t i = 1; i < count; i++)
        if (keys[i] < keys[i - 1])
            return false;
    return true;
}

/* By radix, the digits in which keys differ only: pages of 4 KiB in 256 MiB differ in two.
 * Returns which half of the scratch of 2 * count entries has them sorted; NULL: no memory. */
static struct entry *sorted(const uint64_t *keys, size_t count, struct entry *scratch)
{
    struct entry *from = scratch, *to = scratch + count;
    uint64_t differing = 0;
    for (size_t i = 0; i < count; i++) {
        from[i] = (struct entry){keys[i], i};
        differing |= keys[i] ^ keys[0];
    }
    for (unsigned shift = 0; shift < 64 && differing >> shift; shift += DIGIT_BITS) {
        if (!(differing >> shift & (DIGITS - 1)))
            continue;
        size_t places[DIGITS] = {0}, place = 0;
        for (size_t i = 0; i < count; i++)
            places[from[i].key >> shift & (DIGITS - 1)]++;
        for (size_t digit = 0; digit < DIGITS; digit++) {
            size_t so_many = places[digit];
            places[digit] = place;
            place += so_many;
        }
        for (size_t i = 0; i < count; i++)
            to[places[from[i].key >> shift & (DIGITS - 1)]++] = from[i];
        struct entry *last = from;
        from = to;
        to = last;
    }
    return from;
}

/* Writes the joined runs and returns how many there are; 0: two overlap in their destination, or
 * there is no memory, and Python goes about it. The results have room for `count` > 0. */
EXPORT size_t mooncake_merge(const uint64_t *destinations, const uint64_t *sources,
                             const uint64_t *lengths, size_t count, uint64_t *into, uint64_t *out_of,
                             uint64_t *joined)
{
    struct entry *scratch = NULL, *order = NULL;
    if (!in_order(destinations, count)) {
        scratch = malloc(2 * count * sizeof *scratch);
        if (!scratch)
            return 0;
        order = sorted(destinations, count, scratch);
    }
    size_t last = 0;
    bool overlap = false;
    for (size_t i = 0; i < count; i++) {
        size_t run = order ? order[i].run : i;
        uint64_t destination = destinations[run], source = sources[run], length = lengths[run];
        uint64_t end = i ? into[last] + joined[last] : 0;
        overlap |= destination < end;
        if (i && destination == end && source == out_of[last] + joined[last]) {
            joined[last] += length;
            continue;
        }
        last += i > 0;
        into[last] = destination;
        out_of[last] = source;
        joined[last] = length;
    }
    free(scratch);
    return overlap ? 0 : last + 1;
}
