/* The registered address ranges as the serving loop sees them, and the slices it serves right now.
 *
 * Python's RegionTable is the owner and hands its sorted, disjoint ranges over whole, so that there
 * is no second account of them. */

#include "native.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

struct regions {
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t left;
    size_t count;
    uint64_t *starts, *ends;
    struct region_use *uses;
};

EXPORT struct regions *mooncake_regions_new(void)
{
    struct regions *regions = calloc(1, sizeof *regions);
    if (regions) {
        pthread_mutex_init(&regions->lock, NULL);
        pthread_cond_init(&regions->left, NULL);
    }
    return regions;
}

EXPORT void mooncake_regions_free(struct regions *regions)
{
    pthread_cond_destroy(&regions->left);
    pthread_mutex_destroy(&regions->lock);
    free(regions->starts);
    free(regions);
}

static bool touches(const struct region_use *use, uint64_t start, uint64_t end)
{
    for (size_t i = 0; i < use->count; i++)
        if (use->addresses[i] < end && use->addresses[i] + use->lengths[i] > start)
            return true;
    return false;
}

static bool one_is_ending(const struct regions *regions)
{
    for (const struct region_use *use = regions->uses; use; use = use->next)
        if (use->ending)
            return true;
    return false;
}

/* From now on these ranges, sorted and disjoint, may be touched. Who touches [gone, gone_end) is
 * interrupted, and has left when this returns; gone == gone_end: nobody. */
EXPORT void mooncake_regions_replace(struct regions *regions, const uint64_t *starts,
                                     const uint64_t *ends, size_t count, uint64_t gone,
                                     uint64_t gone_end)
{
    uint64_t *copy = malloc(2 * (count + 1) * sizeof *copy);
    if (!copy)
        count = 0; /* nothing is permitted here, so Python serves: slower, and right */
    if (count) {
        memcpy(copy, starts, count * sizeof *copy);
        memcpy(copy + count, ends, count * sizeof *copy);
    }
    pthread_mutex_lock(&regions->lock);
    uint64_t *old = regions->starts;
    regions->starts = copy;
    regions->ends = copy + count;
    regions->count = count;
    for (struct region_use *use = regions->uses; use; use = use->next)
        if (gone != gone_end && touches(use, gone, gone_end)) {
            use->ending = true;
            shutdown(use->fd, SHUT_RDWR);
        }
    while (gone != gone_end && one_is_ending(regions))
        pthread_cond_wait(&regions->left, &regions->lock);
    pthread_mutex_unlock(&regions->lock);
    free(old);
}

/* Does one range hold all of the run? Neighbouring runs mostly lie in the same: `slot` is where the
 * last one was found. */
static bool inside(const struct regions *regions, uint64_t address, uint64_t length, size_t *slot)
{
    const uint64_t *starts = regions->starts, *ends = regions->ends;
    if (*slot >= regions->count || address < starts[*slot] || address >= ends[*slot]) {
        size_t low = 0, high = regions->count; /* the last start <= address is before `high` */
        while (low < high) {
            size_t middle = low + (high - low) / 2;
            if (starts[middle] <= address)
                low = middle + 1;
            else
                high = middle;
        }
        if (!low)
            return false;
        *slot = low - 1;
    }
    return address < ends[*slot] && length <= ends[*slot] - address;
}

/* Touch the runs of `use` until regions_leave. False: they do not all lie in a region. */
bool regions_enter(struct regions *regions, struct region_use *use)
{
    pthread_mutex_lock(&regions->lock);
    bool permitted = true;
    size_t slot = 0;
    for (size_t i = 0; permitted && i < use->count; i++)
        permitted = inside(regions, use->addresses[i], use->lengths[i], &slot);
    if (permitted) {
        use->ending = false;
        use->next = regions->uses;
        use->back = &regions->uses;
        if (use->next)
            use->next->back = &use->next;
        regions->uses = use;
    }
    pthread_mutex_unlock(&regions->lock);
    return permitted;
}

void regions_leave(struct regions *regions, struct region_use *use)
{
    pthread_mutex_lock(&regions->lock);
    *use->back = use->next;
    if (use->next)
        use->next->back = use->back;
    if (use->ending)
        pthread_cond_broadcast(&regions->left);
    pthread_mutex_unlock(&regions->lock);
}
