/* The answering side: frame after frame of one lane, served without the interpreter lock.
 *
 * This loop serves what is plainly right. A frame that it finds anything wrong with, and whatever
 * the ledgers do not permit, it hands over unserved: serving.py judges it anew and makes the text. */

#include "native.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { SPIN_BYTES = 64 << 10 }; /* after a slice up to this the next request is looked for */

struct serving {
    int fd;
    struct regions *regions;
    struct grants *grants;
    uint8_t *frame;      /* Python's, so that it can read what is handed over */
    uint64_t most_bytes; /* wire.py's limits; `frame` has room for the latter two */
    uint32_t most_runs, most_grant_bytes;
    bool small;             /* the last slice was */
    struct spin spin;
    struct iovec one;
    struct answer answer;
    struct iovec iovecs[MOST_RUNS + 1];
};

EXPORT struct serving *mooncake_serving_new(int fd, struct regions *regions, struct grants *grants,
                                            uint8_t *frame, uint64_t most_bytes,
                                            uint32_t most_runs, uint32_t most_grant_bytes)
{
    struct serving *serving = calloc(1, sizeof *serving);
    if (serving) {
        serving->fd = fd;
        serving->regions = regions;
        serving->grants = grants;
        serving->frame = frame;
        serving->most_bytes = most_bytes;
        serving->most_runs = most_runs < MOST_RUNS ? most_runs : MOST_RUNS;
        serving->most_grant_bytes = most_grant_bytes;
    }
    return serving;
}

EXPORT void mooncake_serving_free(struct serving *serving)
{
    free(serving);
}

/* All of it; the socket's time-outs bound each wait for one more byte. */
static int receive_all(int fd, struct cursor *into)
{
    while (into->left) {
        int64_t moved = receive_once(fd, into, MSG_WAITALL);
        if (moved == 0)
            return CUT;
        if (moved < 0 && moved != -EINTR)
            return (int)moved;
    }
    return DONE;
}

static int send_all(int fd, struct cursor *from)
{
    while (from->left) {
        int64_t moved = send_once(fd, from, 0);
        if (moved < 0 && moved != -EINTR)
            return (int)moved;
    }
    return DONE;
}

static struct cursor over_one(struct serving *serving, void *start, size_t bytes)
{
    serving->one = (struct iovec){start, bytes};
    return cursor_over(&serving->one, 1, bytes);
}

/* Wait for the next frame for as long as it takes: idle is not stopped, no frame is begun. As every
 * frame has it, ALIGN bytes are received at once: the header, and the first of `body`. */
static int next_header(struct serving *serving)
{
    struct cursor into = over_one(serving, serving->frame, ALIGN);
    int64_t moved = -EAGAIN, look = SPIN_NS;
    if (serving->small)
        moved = receive_spinning(serving->fd, &into, &serving->spin, &look);
    while (moved == -EAGAIN || moved == -EINTR)
        moved = receive_once(serving->fd, &into, MSG_WAITALL);
    if (moved == 0)
        return ENDED;
    return moved < 0 ? (int)moved : receive_all(serving->fd, &into);
}

static bool header_is_good(const struct serving *serving, const struct request *request)
{
    return (request->op == READ || request->op == WRITE) && request->runs &&
           request->runs <= serving->most_runs && request->nbytes &&
           request->nbytes <= serving->most_bytes &&
           request->grant_bytes <= serving->most_grant_bytes;
}

/* All positive, adding up to `nbytes`. Each is at most 2^30 and they are 1024 at most: no wrap. */
static bool lengths_are_good(const uint64_t *lengths, size_t count, uint64_t nbytes)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        if (!lengths[i] || lengths[i] > nbytes)
            return false;
        sum += lengths[i];
    }
    return sum == nbytes;
}

/* Move the bytes that the ledgers permitted. */
static int move(struct serving *serving, const struct request *request, const uint64_t *addresses,
                const uint64_t *lengths)
{
    serving->answer = (struct answer){.request_id = request->request_id};
    serving->iovecs[0] = (struct iovec){&serving->answer, ANSWER_BYTES};
    fill_runs(serving->iovecs + 1, addresses, lengths, request->runs);
    if (request->op == READ) {
        struct cursor from =
            cursor_over(serving->iovecs, request->runs + 1, ANSWER_BYTES + request->nbytes);
        return send_all(serving->fd, &from);
    }
    struct cursor into = cursor_over(serving->iovecs + 1, request->runs, request->nbytes);
    return receive_all(serving->fd, &into);
}

static int serve_one(struct serving *serving)
{
    struct request request;
    int end = next_header(serving);
    if (end != DONE)
        return end;
    memcpy(&request, serving->frame, sizeof request);
    if (!header_is_good(serving, &request))
        return HANDED;

    size_t table = (size_t)request.runs * sizeof(uint64_t);
    uint8_t *body = serving->frame + HEADER_BYTES;
    size_t rest = HEADER_BYTES + body_bytes(&request) - ALIGN;
    if (rest) {
        struct cursor into = over_one(serving, serving->frame + ALIGN, rest);
        end = receive_all(serving->fd, &into);
        if (end != DONE)
            return end;
    }
    const uint64_t *addresses = (const uint64_t *)body;
    const uint64_t *lengths = addresses + request.runs;
    if (!lengths_are_good(lengths, request.runs, request.nbytes))
        return HANDED_BODY;

    struct grant_use granted = {.fd = serving->fd};
    struct region_use touched = {
        .addresses = addresses, .lengths = lengths, .count = request.runs, .fd = serving->fd};
    if (!grants_enter(serving->grants, &granted, body + 2 * table, request.grant_bytes))
        return HANDED_BODY;
    if (!regions_enter(serving->regions, &touched)) {
        grants_leave(serving->grants, &granted);
        return HANDED_BODY;
    }
    end = move(serving, &request, addresses, lengths);
    regions_leave(serving->regions, &touched);
    grants_leave(serving->grants, &granted);

    serving->small = request.nbytes <= SPIN_BYTES;
    if (end == DONE && request.op == WRITE) {
        struct cursor from = over_one(serving, &serving->answer, ANSWER_BYTES);
        end = send_all(serving->fd, &from);
    }
    return end;
}

/* Serve until there is something for Python: a frame to judge, the end, or an error. */
EXPORT int mooncake_serve(struct serving *serving)
{
    int end = DONE;
    while (end == DONE)
        end = serve_one(serving);
    return end;
}
