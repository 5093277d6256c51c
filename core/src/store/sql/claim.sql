-- Takes up to $5 ready jobs for the session $1 out of the queues $2, an equal
-- share for each of up to $4 flows of a queue after that queue's $3: a loose
-- index scan finds the flows, so that one tenant's million jobs cost another's
-- first one nothing. A flow is a company, or a webhook. Each share begins at its
-- first ready row, which the walk has found already: dead entries before it are
-- walked once. Flows that may be taken from come in the order of the walk, queues
-- among them in the order given, which the caller turns, as it moves $3 on: with
-- room for one job, each gets its turn. Nothing is taken out of a paused queue. A session that has
-- been declared dead takes nothing; its row is locked so that it cannot be
-- declared dead in between.
--
-- A flow with limits is taken from by one claim at a time: who finds its row
-- locked, or of another version than its own snapshot shows, leaves it, since
-- what it would count as running may be out of date.
with me as (
    select id from worker_sessions where id = $1 and ended_at is null for key share
),
tenants as materialized (
    select q.queue, c.flow_id, c.priority, c.id, c.place, q.turn
    from unnest($2::text[], $3::uuid[]) with ordinality as q (queue, after, turn)
    cross join lateral (
        with recursive walk as (
            (
                select j.flow_id, j.priority, j.id, 1 as place
                from jobs j
                where j.state = 'ready' and j.queue = q.queue and j.flow_id > q.after
                order by j.flow_id, j.priority, j.id
                limit 1
            )
            union all
            select following.flow_id, following.priority, following.id, walk.place + 1
            from walk
            cross join lateral (
                select j.flow_id, j.priority, j.id
                from jobs j
                where j.state = 'ready' and j.queue = q.queue and j.flow_id > walk.flow_id
                order by j.flow_id, j.priority, j.id
                limit 1
            ) following
            where walk.place < $4
        )
        select flow_id, priority, id, place from walk
    ) c
    where not exists (select from queue_pauses p where p.queue = q.queue)
    order by c.place, q.turn
),
limits as materialized (
    select f.queue, f.flow_id, f.version,
        case
            when f.open_until > clock_timestamp() then 0
            else least(
                least(f.max_running, f.bears) - case
                    when f.webhook_id is not null then (
                        select count(*) from jobs r where r.state = 'running' and r.webhook_id = f.webhook_id
                    )
                    else (
                        select count(*) from jobs r
                        where r.state = 'running' and r.session_id > 0 and r.company_id = f.company_id
                            and r.queue = f.queue
                    )
                end,
                case when f.rate is not null then floor(least(
                    greatest(f.rate, 1),
                    f.tokens + extract(epoch from clock_timestamp() - f.tokens_at)::float8 * f.rate
                )) end
            )
        end::bigint as room
    from tenants t
    cross join lateral (select * from flows f where f.queue = t.queue and f.flow_id = t.flow_id offset 0) f
),
open as materialized (
    select l.queue, l.flow_id, l.room
    from limits l
    cross join lateral (
        select from flows f
        where f.queue = l.queue and f.flow_id = l.flow_id and f.version = l.version
        for update skip locked
    ) mine
    where l.room > 0
),
shares as materialized (
    select t.queue, t.flow_id, t.priority, t.id,
        least(ceil($5::bigint::float8 / count(*) over ())::bigint, o.room) as share
    from tenants t
    left join limits l using (queue, flow_id)
    left join open o using (queue, flow_id)
    where l.flow_id is null or o.flow_id is not null
    order by row_number() over (partition by t.queue order by t.place), t.turn
),
picked as materialized (
    select job.id, s.queue, s.flow_id
    from shares s
    cross join lateral (
        select j.id
        from jobs j
        where j.state = 'ready' and j.queue = s.queue and j.flow_id = s.flow_id
            and (j.priority, j.id) >= (s.priority, s.id)
        order by j.priority, j.id
        limit s.share
        for update skip locked
    ) job
    limit $5
),
spent as (
    update flows f
    set version = f.version + 1,
        tokens = case when f.rate is null then f.tokens else
            least(greatest(f.rate, 1), f.tokens + extract(epoch from clock_timestamp() - f.tokens_at)::float8 * f.rate) - t.taken
        end,
        tokens_at = clock_timestamp()
    from (select queue, flow_id, count(*) as taken from picked group by queue, flow_id) t
    where f.queue = t.queue and f.flow_id = t.flow_id and exists (select from open o where o.flow_id = f.flow_id)
),
taken as (
    update jobs
    set state = 'running',
        lease_epoch = lease_epoch + 1,
        attempt = attempt + 1,
        session_id = $1,
        deadline_at = clock_timestamp() + (timeout_ms + $6) * interval '1 millisecond'
    where id = any (array(select id from picked)) and exists (select from me)
    returning id, lease_epoch, queue, kind, company_id, flow_id, ref_id, step, item, priority, attempt, crash_count,
        timeout_ms
)
select taken.id as "id?", taken.lease_epoch as "lease_epoch?", taken.queue as "queue?", taken.kind as "kind?",
    taken.company_id as "company_id?", taken.flow_id as "flow_id?", taken.ref_id, taken.step as "step?", taken.item,
    taken.priority as "priority?", taken.attempt as "attempt?", taken.crash_count as "crash_count?",
    taken.timeout_ms as "timeout_ms?", seen.tenants as "tenants!", seen.queues as "queues!: Vec<String>",
    seen.lasts as "lasts!: Vec<Uuid>", seen.walked as "walked!: Vec<i64>", seen.open as "open!: Vec<i64>"
from (
    -- How far the walk has come in each queue, and how many flows of it may be taken from.
    select coalesce(sum(open), 0)::bigint as tenants, coalesce(array_agg(queue), '{}') as queues,
        coalesce(array_agg(last), '{}') as lasts, coalesce(array_agg(walked), '{}') as walked,
        coalesce(array_agg(open), '{}') as open
    from (
        select t.queue, (array_agg(t.flow_id order by t.place desc))[1] as last, count(*) as walked,
            count(s.flow_id) as open
        from tenants t left join shares s using (queue, flow_id)
        group by t.queue
    ) w
) seen
left join taken on true
