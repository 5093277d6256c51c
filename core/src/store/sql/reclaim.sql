-- Gives back what a dead session held, and what has outlived its deadline by
-- more than a worker could: one guarded statement, so that it never acts on
-- an old read. The death of a worker costs no try; it raises crash_count and
-- makes the job wait, longer each time, and each job for another while: what
-- was in the same hands comes apart, so that one of them that kills its
-- workers takes the others with it once, not time and again. From $3 deaths on
-- the count is not raised here: such a job is charged when it really begins.
-- A session that ended in order, after an outage say, was no death.
with lost as (
    select j.id, (s.state is distinct from 'ended')::integer as death
    from jobs j
    left join worker_sessions s on s.id = j.session_id
    where j.state = 'running'
        and (s.id is null or s.ended_at is not null or j.deadline_at < now())
    order by j.session_id
    limit $1
    for update of j skip locked
)
update jobs
set state = 'scheduled',
    session_id = null,
    deadline_at = null,
    attempt = greatest(attempt - 1, 0),
    crash_count = case lost.death
        when 1 then greatest(crash_count, least(crash_count + 1, $3::smallint))
        else least(crash_count, $3::smallint)
    end,
    due_at = now()
        + least(power(2, crash_count), 60) * (0.5 + random()) * $2 * lost.death * interval '1 millisecond'
from lost
where jobs.id = any (array[lost.id])
returning jobs.id, jobs.session_id, jobs.crash_count
