/* The asking side: one slice from the first byte of its request to the last of its answer.
 *
 * An exchange is a state that a call moves on as far as it can. It returns AGAIN when it would
 * block (exchange_start told to hold), or when a blocking call came back early, by its time-out or
 * a signal: Python then looks at the deadline, runs its signal handlers, and calls again. */

#include "native.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

/* Where a peer's answer is waited for with open eyes: what takes longer to copy than a wake-up
 * costs (21 us) is slept for. */
enum { SPIN_BYTES = 256 << 10 };

enum step { SENDING, AWAITING, SCATTERING };

struct exchange {
    int fd;
    enum step step;
    const struct slice *slice; /* Python keeps it alive until the exchange is over */
    struct cursor cursor;      /* of what the step moves */
    struct spin spin;
    int64_t look;              /* ns left to look for bytes in this exchange */
    uint64_t awaited;          /* bytes, when the answer was */
    struct request request;
    struct told told;
    struct iovec iovecs[ASK_PARTS + MOST_RUNS];
};

EXPORT struct exchange *mooncake_exchange_new(int fd)
{
    struct exchange *exchange = calloc(1, sizeof *exchange);
    if (exchange)
        exchange->fd = fd;
    return exchange;
}

EXPORT void mooncake_exchange_free(struct exchange *exchange)
{
    free(exchange);
}

/* What HANDED spoke of. */
EXPORT const struct told *mooncake_exchange_told(const struct exchange *exchange)
{
    return &exchange->told;
}

/* Where soon both will be there, the bytes of a read are received in the same call. */
static void await_answer(struct exchange *exchange)
{
    const struct slice *slice = exchange->slice;
    size_t runs = slice->op == READ && slice->nbytes <= SPIN_BYTES ? slice->count : 0;
    exchange->step = AWAITING;
    exchange->iovecs[0] = (struct iovec){&exchange->told.answer, ANSWER_BYTES};
    fill_runs(exchange->iovecs + 1, slice->local, slice->lengths, runs);
    exchange->awaited = ANSWER_BYTES + (runs ? slice->nbytes : 0);
    exchange->cursor = cursor_over(exchange->iovecs, runs + 1, exchange->awaited);
}

static void scatter(struct exchange *exchange)
{
    const struct slice *slice = exchange->slice;
    exchange->step = SCATTERING;
    if (exchange->awaited > ANSWER_BYTES)
        return;
    fill_runs(exchange->iovecs, slice->local, slice->lengths, slice->count);
    exchange->cursor = cursor_over(exchange->iovecs, slice->count, slice->nbytes);
}

/* What came behind an answer that is no OK, to where the bytes should have gone, is its reason. */
static void keep_reason(struct exchange *exchange, uint64_t bytes)
{
    struct told *told = &exchange->told;
    const struct slice *slice = exchange->slice;
    told->reason_bytes = 0;
    for (size_t i = 0; bytes && i < slice->count && told->reason_bytes < REASON_BYTES; i++) {
        uint64_t part = bytes < slice->lengths[i] ? bytes : slice->lengths[i];
        if (part > REASON_BYTES - told->reason_bytes)
            part = REASON_BYTES - told->reason_bytes;
        memcpy(told->reason + told->reason_bytes, (void *)(uintptr_t)slice->local[i], part);
        told->reason_bytes += part;
        bytes -= part;
    }
}

/* One call for the present step. Spins where bytes are awaited and soon there; `hold`: and does not
 * block after it. */
static int64_t move_once(struct exchange *exchange, bool hold)
{
    int wait = hold ? MSG_DONTWAIT : 0;
    if (exchange->step == SENDING)
        return send_once(exchange->fd, &exchange->cursor, wait);
    if (exchange->slice->nbytes <= SPIN_BYTES) {
        int64_t moved = receive_spinning(exchange->fd, &exchange->cursor, &exchange->spin,
                                         &exchange->look);
        if (moved != -EAGAIN || hold)
            return moved;
    }
    int all = exchange->step == SCATTERING ? MSG_WAITALL : 0; /* no more may come than an answer */
    return receive_once(exchange->fd, &exchange->cursor, wait | all);
}

/* A blocking call that came back with less than it was asked for met its time-out or a signal. */
static int proceed(struct exchange *exchange, bool hold)
{
    for (;;) {
        size_t asked = exchange->cursor.count;
        int64_t moved = move_once(exchange, hold);
        if (moved == -EAGAIN || moved == -EINTR)
            return AGAIN;
        if (moved < 0)
            return (int)moved;
        if (moved == 0)
            return ENDED;
        uint64_t left = exchange->cursor.left;
        if (exchange->step == AWAITING) {
            uint64_t came = exchange->awaited - left;
            if (came < ANSWER_BYTES)
                continue;
            if (!says_ok(&exchange->told)) {
                keep_reason(exchange, came - ANSWER_BYTES);
                return HANDED;
            }
            if (exchange->slice->op == WRITE)
                return DONE;
            scatter(exchange);
            left = exchange->cursor.left;
            if (left)
                continue;
        }
        if (left) {
            if (asked <= MOST_RUNS && !hold)
                return AGAIN;
            continue;
        }
        if (exchange->step == SCATTERING)
            return DONE;
        await_answer(exchange);
    }
}

/* Begin an exchange and take it as far as it goes. */
static int start(struct exchange *exchange, const struct slice *slice, bool hold)
{
    if (!slice->count || slice->count > MOST_RUNS)
        return -EINVAL;
    exchange->slice = slice;
    exchange->step = SENDING;
    exchange->look = SPIN_NS;
    exchange->cursor = ask(exchange->iovecs, &exchange->request, slice);
    exchange->told.request_id = exchange->request.request_id;
    return proceed(exchange, hold);
}

/* For a small slice, called with the interpreter lock held: gives up with AGAIN where it would
 * block, after at most one spin. To give the lock up beside a busy Python thread costs 5 ms. */
EXPORT int mooncake_exchange_hold(struct exchange *exchange, const struct slice *slice)
{
    return start(exchange, slice, true);
}

EXPORT int mooncake_exchange_start(struct exchange *exchange, const struct slice *slice)
{
    return start(exchange, slice, false);
}

/* Go on with one that returned AGAIN; blocks. */
EXPORT int mooncake_exchange_go_on(struct exchange *exchange)
{
    return proceed(exchange, false);
}

EXPORT int mooncake_abi(void)
{
    return MOONCAKE_ABI;
}
