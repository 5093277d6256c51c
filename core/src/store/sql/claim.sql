-- Takes up to $5 ready jobs for the session $1 out of the queues $2, an equal
-- share for each of up to $4 companies of a queue after that queue's $3: a loose
-- index scan finds the companies, so that one tenant's million jobs cost
-- another's first one nothing. Each company's share begins at its first ready
-- row, which the walk has found already: dead entries before it are walked once.
-- Companies come in the order of the walk, queues among them in the order given,
-- which the caller turns, as it moves $3 on: with room for one job, each gets its
-- turn. Nothing is taken out of a paused queue. A session that has been declared
-- dead takes nothing; its row is locked so that it cannot be declared dead in
-- between.
with me as (
    select id from worker_sessions where id = $1 and ended_at is null for key share
),
tenants as materialized (
    select q.queue, c.company_id, c.priority, c.id
    from unnest($2::text[], $3::uuid[]) with ordinality as q (queue, after, turn)
    cross join lateral (
        with recursive walk as (
            (
                select j.company_id, j.priority, j.id, 1 as place
                from jobs j
                where j.state = 'ready' and j.queue = q.queue and j.company_id > q.after
                order by j.company_id, j.priority, j.id
                limit 1
            )
            union all
            select following.company_id, following.priority, following.id, walk.place + 1
            from walk
            cross join lateral (
                select j.company_id, j.priority, j.id
                from jobs j
                where j.state = 'ready' and j.queue = q.queue and j.company_id > walk.company_id
                order by j.company_id, j.priority, j.id
                limit 1
            ) following
            where walk.place < $4
        )
        select company_id, priority, id, place from walk
    ) c
    where not exists (select from queue_pauses p where p.queue = q.queue)
    order by c.place, q.turn
),
picked as materialized (
    select share.id
    from tenants
    cross join lateral (
        select j.id
        from jobs j
        where j.state = 'ready' and j.queue = tenants.queue and j.company_id = tenants.company_id
            and (j.priority, j.id) >= (tenants.priority, tenants.id)
        order by j.priority, j.id
        limit (select ceil($5::bigint::float8 / greatest(count(*), 1))::bigint from tenants)
        for update skip locked
    ) share
    limit $5
)
update jobs
set state = 'running',
    lease_epoch = lease_epoch + 1,
    attempt = attempt + 1,
    session_id = $1,
    deadline_at = clock_timestamp() + (timeout_ms + $6) * interval '1 millisecond'
where id = any (array(select id from picked)) and exists (select from me)
returning id, lease_epoch, queue, kind, company_id, ref_id, step, item, priority, attempt, crash_count, timeout_ms,
    (select count(*) from tenants) as "tenants!"
