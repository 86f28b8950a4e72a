/* Copies within one machine: out of or into another process by process_vm_readv and -writev, or
 * between mappings of the same memory by memcpy. */

#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Whose memory it is: of a process, which a pid alone does not tell since it may be given away
 * (nonce.py has the rest), or mapped here, and then whose life these descriptors tell. */
struct owner {
    int64_t pid; /* 0: mapped */
    uint64_t nonce_address;
    uint8_t nonce[32];
    int32_t alive[2]; /* readable: it has ended, or has something to say */
    _Atomic int64_t seen; /* ns: when it was last found to be there; the last word of any thread */
};

/* No pid comes round again so soon after its process was there. */
enum { SEEN_NS = 1000000 };

static int is_there(struct owner *owner)
{
    uint8_t found[sizeof owner->nonce];
    struct iovec here = {found, sizeof found};
    struct iovec there = {(void *)(uintptr_t)owner->nonce_address, sizeof found};
    ssize_t moved = process_vm_readv((pid_t)owner->pid, &here, 1, &there, 1, 0);
    if (moved < 0)
        return -errno;
    if (moved != sizeof found || memcmp(found, owner->nonce, sizeof found))
        return ENDED;
    atomic_store_explicit(&owner->seen, now_ns(), memory_order_relaxed);
    return DONE;
}

static int lives(const struct owner *owner)
{
    struct pollfd fds[] = {{.fd = owner->alive[0], .events = POLLIN},
                           {.fd = owner->alive[1], .events = POLLIN}};
    return poll(fds, 2, 0) == 0 ? DONE : ENDED;
}

struct pair {
    struct iovec here[MOST_RUNS], there[MOST_RUNS];
};

/* By one call. A read brings the nonce along, behind the bytes; a write has it looked at before, as
 * nothing may be written to a stranger, and after. Less than all of it is -EFAULT. */
static int move(struct owner *owner, const struct slice *slice, struct pair *runs)
{
    uint8_t found[sizeof owner->nonce];
    bool is_read = slice->op == READ, nonce_too = is_read && slice->count < MOST_RUNS;
    size_t count = slice->count;
    uint64_t nbytes = slice->nbytes;
    fill_runs(runs->here, slice->local, slice->lengths, count);
    fill_runs(runs->there, slice->remote, slice->lengths, count);
    if (nonce_too) {
        runs->here[count] = (struct iovec){found, sizeof found};
        runs->there[count++] =
            (struct iovec){(void *)(uintptr_t)owner->nonce_address, sizeof found};
        nbytes += sizeof found;
    } else if (!is_read &&
               now_ns() - atomic_load_explicit(&owner->seen, memory_order_relaxed) > SEEN_NS) {
        int end = is_there(owner);
        if (end != DONE)
            return end;
    }
    pid_t pid = (pid_t)owner->pid;
    ssize_t moved = is_read ? process_vm_readv(pid, runs->here, count, runs->there, count, 0)
                            : process_vm_writev(pid, runs->here, count, runs->there, count, 0);
    if (moved < 0)
        return -errno;
    if ((uint64_t)moved != nbytes)
        return -EFAULT; /* it stops at the first page that is not there */
    if (!nonce_too)
        return is_there(owner);
    return memcmp(found, owner->nonce, sizeof found) ? ENDED : DONE;
}

/* A slice of at most MOST_RUNS runs at once, by the calling thread. */
EXPORT int mooncake_copy(struct owner *owner, const struct slice *slice)
{
    struct pair runs;
    return slice->count > MOST_RUNS ? -EINVAL : move(owner, slice, &runs);
}

struct copier {
    struct owner *owner;
    struct piece piece;
    struct pair runs;
};

static int copy_pieces(struct team *team, void *own)
{
    struct copier *copier = own;
    int end = DONE;
    while (end == DONE && team_deal(team, &copier->piece)) {
        end = move(copier->owner, &copier->piece.slice, &copier->runs);
        if (end == DONE && team_is_late(team))
            end = LATE;
    }
    return end;
}

static int copy_mapped_pieces(struct team *team, void *own)
{
    struct copier *copier = own;
    const struct slice *slice = &copier->piece.slice;
    while (team_deal(team, &copier->piece)) {
        const uint64_t *to = slice->op == READ ? slice->local : slice->remote;
        const uint64_t *from = slice->op == READ ? slice->remote : slice->local;
        for (size_t i = 0; i < slice->count; i++)
            memcpy((void *)(uintptr_t)to[i], (void *)(uintptr_t)from[i], slice->lengths[i]);
        if (lives(copier->owner) != DONE)
            return ENDED;
        if (team_is_late(team))
            return LATE;
    }
    return DONE;
}

/* A team of `size` threads, the caller's one of them. NULL with errno when it cannot be had. */
EXPORT struct team *mooncake_copies_new(struct owner *owner, size_t size)
{
    void **own = calloc(size, sizeof *own);
    struct team *team = NULL;
    size_t made = 0;
    for (struct copier *copier; own && made < size; own[made++] = copier) {
        copier = calloc(1, sizeof *copier);
        if (!copier)
            break;
        copier->owner = owner;
    }
    if (own && made == size)
        team = team_new(owner->pid ? copy_pieces : copy_mapped_pieces, own, size, true);
    while (!team && made)
        free(own[--made]);
    free(own);
    return team;
}
