-- The same as claim.sql in the middle of a backlog: companies that are known
-- to have more, each from the row after the last one taken, so that the dead
-- entries at the head of the index are not walked by every claim.
with me as (
    select id from worker_sessions where id = $1 and ended_at is null for key share
),
picked as materialized (
    select share.id
    from unnest($2::text[], $3::uuid[], $4::smallint[], $5::bigint[]) as t (queue, company_id, priority, id)
    cross join lateral (
        select j.id
        from jobs j
        where j.state = 'ready' and j.queue = t.queue and j.company_id = t.company_id
            and (j.priority, j.id) > (t.priority, t.id)
        order by j.priority, j.id
        limit ceil($6::bigint::float8 / cardinality($2::text[]))::bigint
        for update skip locked
    ) share
    limit $6
)
update jobs
set state = 'running',
    lease_epoch = lease_epoch + 1,
    attempt = attempt + 1,
    session_id = $1,
    deadline_at = clock_timestamp() + (timeout_ms + $7) * interval '1 millisecond'
where id = any (array(select id from picked)) and exists (select from me)
returning id, lease_epoch, queue, kind, company_id, ref_id, step, item, priority, attempt, crash_count, timeout_ms
