/* A team: threads that live as long as a prepared run, so that no run pays for starting them. */
#include "limits.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

struct member {
    struct team *team;
    void *part;
    pthread_t thread;
};

struct team {
    part_function *work;
    size_t size;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t begin, end;
    uint64_t turn;  /* counts runs; a member works once for each */
    size_t working; /* members that have not ended this turn */
    int failed;     /* the first negative errno of this turn */
    int over;
    struct member members[]; /* [0] is the caller's, without a thread */
};

static double now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

static void *member_main(void *given)
{
    struct member *self = given;
    struct team *team = self->team;
    uint64_t seen = 0;
    pthread_mutex_lock(&team->lock);
    for (;;) {
        while (team->turn == seen && !team->over)
            pthread_cond_wait(&team->begin, &team->lock);
        if (team->over)
            break;
        seen = team->turn;
        pthread_mutex_unlock(&team->lock);
        int result = team->work(self->part);
        pthread_mutex_lock(&team->lock);
        if (result && !team->failed)
            team->failed = result;
        if (--team->working == 0)
            pthread_cond_signal(&team->end);
    }
    pthread_mutex_unlock(&team->lock);
    return NULL;
}

static void disband(struct team *team, size_t started)
{
    pthread_mutex_lock(&team->lock);
    team->over = 1;
    pthread_cond_broadcast(&team->begin);
    pthread_mutex_unlock(&team->lock);
    for (size_t i = 1; i < started; i++)
        pthread_join(team->members[i].thread, NULL);
    pthread_cond_destroy(&team->begin);
    pthread_cond_destroy(&team->end);
    pthread_mutex_destroy(&team->lock);
    free(team);
}

struct team *limits_team(part_function *work, void *const *parts, size_t size)
{
    struct team *team = calloc(1, sizeof *team + size * sizeof *team->members);
    if (!team)
        return NULL;
    team->work = work;
    team->size = size;
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->begin, NULL);
    pthread_cond_init(&team->end, NULL);
    for (size_t i = 0; i < size; i++) {
        struct member *member = &team->members[i];
        member->team = team;
        member->part = parts[i];
        int refused = i ? pthread_create(&member->thread, NULL, member_main, member) : 0;
        if (refused) {
            disband(team, i);
            errno = refused;
            return NULL;
        }
    }
    return team;
}

static int once(struct team *team)
{
    if (team->size == 1)
        return team->work(team->members[0].part);
    pthread_mutex_lock(&team->lock);
    team->turn++;
    team->working = team->size - 1;
    team->failed = 0;
    pthread_cond_broadcast(&team->begin);
    pthread_mutex_unlock(&team->lock);
    int result = team->work(team->members[0].part);
    pthread_mutex_lock(&team->lock);
    while (team->working)
        pthread_cond_wait(&team->end, &team->lock);
    if (!result)
        result = team->failed;
    pthread_mutex_unlock(&team->lock);
    return result;
}

int limits_many(struct team *team, size_t runs, double *seconds)
{
    for (size_t i = 0; i < runs; i++) {
        double begin = now();
        int result = once(team);
        if (result)
            return result;
        seconds[i] = now() - begin;
    }
    return 0;
}

void limits_disband(struct team *team)
{
    disband(team, team->size);
}
