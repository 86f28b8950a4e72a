/* A team moves a large slice: its members' threads take pieces until there are none left, and the one
 * thread that runs the team waits for them, so that beside a busy interpreter a slice of any size
 * pays once for the interpreter lock. */

#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

enum { STACK_BYTES = 256 << 10 }; /* a member's frames are small: pieces lie in its `own` */

struct member {
    struct team *team;
    pthread_t thread;
    bool has_thread;
    pthread_cond_t begin;
    uint64_t turn; /* it takes part in this one */
};

struct team {
    team_work *work;
    size_t size;
    bool caller_takes_part;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t end;
    uint64_t turn;
    size_t working; /* members that have not ended their turn */
    bool over;

    const struct slice *slice;
    uint64_t piece_bytes;
    int64_t deadline; /* ns */
    size_t run;       /* dealt up to this run, and so many bytes of it */
    uint64_t into;
    bool stopped;     /* deal nothing more: in this turn, */
    bool stopped_for_good; /* and ever */
    int outcome;      /* of the turn: the first that is not DONE, and whose */
    size_t failed;
    void **own;
    struct member members[];
};

int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

void *team_own(struct team *team, size_t member)
{
    return team->own[member];
}

static void work(struct team *team, size_t member)
{
    int outcome = team->work(team, team->own[member]);
    pthread_mutex_lock(&team->lock);
    if (outcome != DONE && team->outcome == DONE) {
        team->outcome = outcome;
        team->failed = member;
        team->stopped = true;
    }
    if (--team->working == 0)
        pthread_cond_signal(&team->end);
    pthread_mutex_unlock(&team->lock);
}

static void *member_main(void *given)
{
    struct member *self = given;
    struct team *team = self->team;
    size_t index = self - team->members;
    uint64_t seen = 0;
    for (;;) {
        pthread_mutex_lock(&team->lock);
        while (self->turn == seen && !team->over)
            pthread_cond_wait(&self->begin, &team->lock);
        bool over = team->over;
        seen = self->turn;
        pthread_mutex_unlock(&team->lock);
        if (over)
            return NULL;
        work(team, index);
    }
}

static int start_thread(struct member *member)
{
    /* A signal is for a thread that runs Python: here it would only cut system calls short. */
    sigset_t all, before;
    pthread_attr_t attributes;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    int refused = pthread_create(&member->thread, &attributes, member_main, member);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!refused)
        pthread_setname_np(member->thread, "mooncake-team");
    return refused;
}

/* End the threads, which must be idle, and free all. */
EXPORT void mooncake_team_free(struct team *team)
{
    pthread_mutex_lock(&team->lock);
    team->over = true;
    for (size_t i = 0; i < team->size; i++)
        pthread_cond_signal(&team->members[i].begin);
    pthread_mutex_unlock(&team->lock);
    for (size_t i = 0; i < team->size; i++) {
        if (team->members[i].has_thread)
            pthread_join(team->members[i].thread, NULL);
        pthread_cond_destroy(&team->members[i].begin);
        free(team->own[i]);
    }
    pthread_cond_destroy(&team->end);
    pthread_mutex_destroy(&team->lock);
    free(team->own);
    free(team);
}

struct team *team_new(team_work *work, void *const *own, size_t size, bool caller_takes_part)
{
    struct team *team = calloc(1, sizeof *team + size * sizeof *team->members);
    void **owns = calloc(size, sizeof *owns);
    if (!team || !owns) {
        free(team);
        free(owns);
        errno = ENOMEM;
        return NULL;
    }
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->end, &monotonic);
    pthread_condattr_destroy(&monotonic);
    team->work = work;
    team->own = owns;
    team->size = size;
    team->caller_takes_part = caller_takes_part;
    for (size_t i = 0; i < size; i++) {
        team->members[i].team = team;
        pthread_cond_init(&team->members[i].begin, NULL);
    }
    for (size_t i = caller_takes_part; i < size; i++) {
        int refused = start_thread(&team->members[i]);
        if (refused) {
            mooncake_team_free(team);
            errno = refused;
            return NULL;
        }
        team->members[i].has_thread = true;
    }
    for (size_t i = 0; i < size; i++) /* only now: until here they are the caller's to free */
        owns[i] = own[i];
    return team;
}

bool team_is_late(struct team *team)
{
    return now_ns() >= team->deadline;
}

bool team_deal(struct team *team, struct piece *piece)
{
    const struct slice *all = team->slice;
    size_t count = 0;
    uint64_t nbytes = 0;
    pthread_mutex_lock(&team->lock);
    bool open = !team->stopped && !team->stopped_for_good;
    while (open && team->run < all->count && count < MOST_RUNS) {
        uint64_t left = all->lengths[team->run] - team->into;
        uint64_t room = team->piece_bytes - nbytes;
        if (left > room && count && left <= team->piece_bytes)
            break; /* a run that fits into a piece is not cut */
        uint64_t part = left < room ? left : room;
        if (!part)
            break;
        piece->local[count] = all->local[team->run] + team->into;
        piece->remote[count] = all->remote[team->run] + team->into;
        piece->lengths[count++] = part;
        nbytes += part;
        team->into += part;
        if (part == left) {
            team->run++;
            team->into = 0;
        }
    }
    pthread_mutex_unlock(&team->lock);
    piece->slice = *all;
    piece->slice.local = piece->local;
    piece->slice.remote = piece->remote;
    piece->slice.lengths = piece->lengths;
    piece->slice.count = count;
    piece->slice.nbytes = nbytes;
    return count > 0;
}

/* No member has more to do than this. */
static size_t wanted(const struct team *team, const struct slice *slice)
{
    uint64_t by_bytes = (slice->nbytes + team->piece_bytes - 1) / team->piece_bytes;
    uint64_t by_runs = (slice->count + MOST_RUNS - 1) / MOST_RUNS;
    uint64_t pieces = by_bytes > by_runs ? by_bytes : by_runs;
    return pieces < team->size ? pieces : team->size;
}

/* Wait for the end of the turn, `wait_ns` at most: AGAIN, or how it ended. `ended` is when this
 * returns: what the caller waits from then on is for the interpreter lock. */
EXPORT int mooncake_team_wait(struct team *team, int64_t wait_ns, int64_t *ended)
{
    int64_t until = now_ns() + wait_ns;
    struct timespec limit = {until / 1000000000, until % 1000000000};
    pthread_mutex_lock(&team->lock);
    while (team->working && pthread_cond_timedwait(&team->end, &team->lock, &limit) == 0)
        ;
    int outcome = team->working ? AGAIN : team->outcome;
    if (outcome == DONE && team->stopped_for_good)
        outcome = ENDED;
    pthread_mutex_unlock(&team->lock);
    *ended = now_ns();
    return outcome;
}

/* Move the slice in pieces of `piece_bytes` > 0 at most. One caller at a time; what is AGAIN goes on
 * with mooncake_team_wait, and is over only when that says how it ended. */
EXPORT int mooncake_team_run(struct team *team, const struct slice *slice, uint64_t piece_bytes,
                             int64_t deadline, int64_t wait_ns, int64_t *ended)
{
    pthread_mutex_lock(&team->lock);
    team->slice = slice;
    team->piece_bytes = piece_bytes;
    team->deadline = deadline;
    team->run = 0;
    team->into = 0;
    team->stopped = false;
    team->outcome = DONE;
    team->turn++;
    team->working = wanted(team, slice);
    for (size_t i = 0; i < team->working; i++) {
        team->members[i].turn = team->turn;
        pthread_cond_signal(&team->members[i].begin);
    }
    pthread_mutex_unlock(&team->lock);
    if (team->caller_takes_part)
        work(team, 0);
    return mooncake_team_wait(team, wait_ns, ended);
}

/* Deal nothing more, now and later; members end with the pieces that they have. Any thread. */
EXPORT void mooncake_team_stop(struct team *team)
{
    pthread_mutex_lock(&team->lock);
    team->stopped_for_good = true;
    pthread_mutex_unlock(&team->lock);
}

/* Whose outcome that of the last turn was. */
EXPORT size_t mooncake_team_failed(const struct team *team)
{
    return team->failed;
}
