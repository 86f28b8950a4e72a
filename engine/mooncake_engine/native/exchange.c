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
    bool is_write;
    enum step step;
    uint32_t runs;
    uint64_t nbytes;
    const uint64_t *local;   /* Python keeps both alive until the exchange is over */
    const uint64_t *lengths;
    struct cursor cursor;    /* of what the step moves */
    struct spin spin;
    int64_t look;            /* ns left to look for bytes in this exchange */
    struct iovec one;        /* the answer */
    uint8_t header[HEADER_BYTES];
    uint8_t expected[ANSWER_BYTES];
    uint8_t answer[ANSWER_BYTES];
    struct iovec iovecs[MOST_RUNS + 4]; /* header, addresses, lengths, grant, then a write's bytes */
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

/* The header of an answer that HANDED spoke of. */
EXPORT const uint8_t *mooncake_exchange_answer(const struct exchange *exchange)
{
    return exchange->answer;
}

static void await_answer(struct exchange *exchange)
{
    exchange->step = AWAITING;
    exchange->one = (struct iovec){exchange->answer, ANSWER_BYTES};
    exchange->cursor = cursor_over(&exchange->one, 1, ANSWER_BYTES);
}

static void scatter(struct exchange *exchange)
{
    exchange->step = SCATTERING;
    fill_runs(exchange->iovecs, exchange->local, exchange->lengths, exchange->runs);
    exchange->cursor = cursor_over(exchange->iovecs, exchange->runs, exchange->nbytes);
}

/* One call for the present step. Spins where bytes are awaited and soon there; `hold`: and does not
 * block after it. */
static int64_t move_once(struct exchange *exchange, bool hold)
{
    int wait = hold ? MSG_DONTWAIT : 0;
    if (exchange->step == SENDING)
        return send_once(exchange->fd, &exchange->cursor, wait);
    if (exchange->nbytes <= SPIN_BYTES) {
        int64_t moved = receive_spinning(exchange->fd, &exchange->cursor, &exchange->spin,
                                         &exchange->look);
        if (moved != -EAGAIN || hold)
            return moved;
    }
    return receive_once(exchange->fd, &exchange->cursor, wait);
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
        if (exchange->cursor.left) {
            if (asked <= MOST_RUNS && !hold)
                return AGAIN;
            continue;
        }
        switch (exchange->step) {
        case SENDING:
            await_answer(exchange);
            break;
        case AWAITING:
            if (memcmp(exchange->answer, exchange->expected, ANSWER_BYTES) != 0)
                return HANDED;
            if (exchange->is_write)
                return DONE;
            scatter(exchange);
            break;
        case SCATTERING:
            return DONE;
        }
    }
}

/* Begin an exchange and take it as far as it goes. `header` and `expected` are frames of wire.py:
 * the request's, and the answer that says OK to it. */
static int start(struct exchange *exchange, const uint8_t *header, const uint8_t *expected,
                 const uint64_t *remote, const uint64_t *lengths, const uint64_t *local,
                 uint32_t runs, uint64_t nbytes, const uint8_t *grant, uint32_t grant_bytes,
                 int is_write, bool hold)
{
    if (!runs || runs > MOST_RUNS)
        return -EINVAL;
    exchange->is_write = is_write;
    exchange->runs = runs;
    exchange->nbytes = nbytes;
    exchange->local = local;
    exchange->lengths = lengths;
    exchange->step = SENDING;
    exchange->look = SPIN_NS;
    memcpy(exchange->header, header, HEADER_BYTES);
    memcpy(exchange->expected, expected, ANSWER_BYTES);

    struct iovec *parts = exchange->iovecs;
    size_t count = 0, table = (size_t)runs * sizeof *remote;
    uint64_t bytes = HEADER_BYTES + 2 * table + grant_bytes;
    parts[count++] = (struct iovec){exchange->header, HEADER_BYTES};
    parts[count++] = (struct iovec){(void *)remote, table};
    parts[count++] = (struct iovec){(void *)lengths, table};
    if (grant_bytes)
        parts[count++] = (struct iovec){(void *)grant, grant_bytes};
    if (is_write) {
        fill_runs(parts + count, local, lengths, runs);
        count += runs;
        bytes += nbytes;
    }
    exchange->cursor = cursor_over(parts, count, bytes);
    return proceed(exchange, hold);
}

/* For a small slice, called with the interpreter lock held: gives up with AGAIN where it would
 * block, after at most one spin. To give the lock up beside a busy Python thread costs 5 ms. */
EXPORT int mooncake_exchange_hold(struct exchange *exchange, const uint8_t *header,
                                  const uint8_t *expected, const uint64_t *remote,
                                  const uint64_t *lengths, const uint64_t *local, uint32_t runs,
                                  uint64_t nbytes, const uint8_t *grant, uint32_t grant_bytes,
                                  int is_write)
{
    return start(exchange, header, expected, remote, lengths, local, runs, nbytes, grant,
                 grant_bytes, is_write, true);
}

EXPORT int mooncake_exchange_start(struct exchange *exchange, const uint8_t *header,
                                   const uint8_t *expected, const uint64_t *remote,
                                   const uint64_t *lengths, const uint64_t *local, uint32_t runs,
                                   uint64_t nbytes, const uint8_t *grant, uint32_t grant_bytes,
                                   int is_write)
{
    return start(exchange, header, expected, remote, lengths, local, runs, nbytes, grant,
                 grant_bytes, is_write, false);
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
