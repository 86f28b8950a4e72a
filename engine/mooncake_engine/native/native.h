/* What the files of this library share. Python's side of it is __init__.py in this folder.
 *
 * Plain C without Python.h: one binary serves every Python, and ctypes decides whether a call holds
 * the interpreter lock (PyDLL) or not (CDLL). Nothing here touches a Python object. */

#ifndef MOONCAKE_NATIVE_H
#define MOONCAKE_NATIVE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || __SIZEOF_POINTER__ != 8
#error "frames are little-endian and addresses have 64 bits; the Python twin serves other machines"
#endif

#define EXPORT __attribute__((visibility("default")))

/* Raise it with every change of what Python calls: a library of another number is not used. */
#define MOONCAKE_ABI 4

/* How a call ended. Negative numbers are -errno. The numbers are repeated in __init__.py. */
enum outcome {
    DONE = 0,
    AGAIN = 1,   /* it would block, its time-out passed, or a signal came: look, then go on */
    ENDED = 2,   /* the peer closed, or somebody shut the socket down */
    HANDED = 3,  /* a header (of an answer, of a request) is Python's to judge; nothing was done */
    HANDED_BODY = 4, /* so is a request whose body was received too */
    CUT = 5,     /* as ENDED, in the middle of a frame */
    LATE = 6,    /* the deadline passed */
};

enum {
    MOST_RUNS = 1024,    /* IOV_MAX: what the kernel takes in one call */
    HEADER_BYTES = 24,   /* wire.py, REQUEST */
    ANSWER_BYTES = 64,   /* wire.py, ANSWER */
    ALIGN = 64,          /* divides the length of what comes before bytes; wire.py says why */
};

/* Frames, as wire.py has them; the answer's status 0 is OK. */
enum { READ = 1, WRITE = 2 };
struct request {
    uint8_t op;
    uint8_t unused;
    uint16_t grant_bytes;
    uint32_t runs;
    uint64_t nbytes;
    uint64_t request_id;
};
struct answer {
    uint8_t status;
    uint8_t unused;
    uint16_t reason_bytes;
    uint32_t unused_too;
    uint64_t request_id;
    uint8_t filling[48];
};
/* What comes behind a header before bytes: addresses, lengths, grant, and what fills them up. */
static inline size_t body_bytes(const struct request *request)
{
    size_t all = HEADER_BYTES + request->runs * 2 * sizeof(uint64_t) + request->grant_bytes;
    return (all + ALIGN - 1) / ALIGN * ALIGN - HEADER_BYTES;
}
_Static_assert(sizeof(struct request) == HEADER_BYTES, "wire.py, REQUEST");
_Static_assert(sizeof(struct answer) == ANSWER_BYTES, "wire.py, ANSWER");

/* An answer, and the request that it ought to be for. What is no OK goes to Python as it is. */
enum { REASON_BYTES = 1024 }; /* wire.py, MAX_REASON */
struct told {
    struct answer answer;
    uint64_t request_id;
    uint64_t reason_bytes; /* of the reason, as many as came along with the answer */
    uint8_t reason[REASON_BYTES];
};

static inline bool says_ok(const struct told *told)
{
    const struct answer *answer = &told->answer;
    return !answer->status && !answer->unused && !answer->reason_bytes && !answer->unused_too &&
           answer->request_id == told->request_id;
}

/* What Python asks to be moved; types.py packs it and keeps what it points to. */
struct slice {
    uint64_t op;
    uint64_t count; /* of runs */
    uint64_t nbytes;
    const uint64_t *local, *remote, *lengths;
    const uint8_t *grant;
    uint64_t grant_bytes;
};

/* cursor.c: iovecs that a socket call may move in part. */
struct cursor {
    struct iovec *at; /* the first that is not done */
    size_t count;
    uint64_t left;    /* bytes */
};

/* Header, addresses, lengths, grant and filling come before a write's bytes. */
enum { ASK_PARTS = 5 };

/* A request for the slice in `parts`, with room for ASK_PARTS + count, all of it still to be sent;
 * `request` is its header, numbered anew. */
struct cursor ask(struct iovec *parts, struct request *request, const struct slice *slice);

struct cursor cursor_over(struct iovec *runs, size_t count, uint64_t bytes);
void fill_runs(struct iovec *into, const uint64_t *addresses, const uint64_t *lengths, size_t count);

/* One socket call, `flags` added to those that every call has. Bytes moved; 0: the end of the
 * stream (receiving); -errno. */
int64_t receive_once(int fd, struct cursor *into, int flags);
int64_t send_once(int fd, struct cursor *from, int flags);

/* spin.c: whether to look for bytes for a moment before sleeping until they come. */
enum { SPIN_NS = 50000 }; /* the longest look: a wake-up costs 21 us, a time slice is 3 ms */

struct spin {
    uint32_t skip;  /* so many chances are left out before the next try */
    uint32_t step;  /* how many were left out the last time */
    uint32_t wary;  /* how many were left out when others wanted the cores */
    uint32_t looks; /* since then */
};

/* As receive_once, without blocking: looks for bytes for up to `budget` ns, and takes what it took
 * from that. -EAGAIN: none came, or it was not worth looking. */
int64_t receive_spinning(int fd, struct cursor *into, struct spin *spin, int64_t *budget);

/* team.c: threads that move one large slice together. They take pieces of it, as many runs and bytes
 * as one system call should have, until there are none left: who is slower takes fewer. */
struct piece {
    struct slice slice; /* its arrays are those below */
    uint64_t local[MOST_RUNS], remote[MOST_RUNS], lengths[MOST_RUNS];
};

struct team;

/* What a member does in a turn; `own` is its. How it ended: DONE, or what the turn shall end with. */
typedef int team_work(struct team *team, void *own);

/* `size` members, whose `own`s become the team's and are freed with it. Where the caller takes part,
 * the first is done by the thread that runs the team. NULL with errno when a thread cannot be had. */
struct team *team_new(team_work *work, void *const *own, size_t size, bool caller_takes_part);
void *team_own(struct team *team, size_t member);

/* The next piece, for one member. False: there is none left, or the turn ends early. */
bool team_deal(struct team *team, struct piece *piece);

/* Past the deadline of the slice? */
bool team_is_late(struct team *team);

int64_t now_ns(void); /* CLOCK_MONOTONIC, as Python's time.monotonic_ns */

/* regions.c and grants.c: what the serving loop may touch, and who is touching it. Python's tables
 * keep them up to date. A use is on its list from the check that permits it until its last byte, so
 * whoever takes memory back finds its socket there, still open, and can wait for it to leave. */
struct region_use {
    struct region_use *next, **back;
    const uint64_t *addresses, *lengths;
    size_t count;
    int fd;
    bool ending;
};

struct regions;
bool regions_enter(struct regions *regions, struct region_use *use);
void regions_leave(struct regions *regions, struct region_use *use);

struct grant;
struct grant_use {
    struct grant_use *next, **back;
    struct grant *grant; /* NULL: the empty grant, which needs no permission */
    int fd;
};

struct grants;
bool grants_enter(struct grants *grants, struct grant_use *use, const uint8_t *token, size_t bytes);
void grants_leave(struct grants *grants, struct grant_use *use);

#endif
