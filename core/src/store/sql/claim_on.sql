-- The same as claim.sql in the middle of a backlog: flows that are known to
-- have more, each from the row after the last one taken, so that the dead
-- entries at the head of the index are not walked by every claim. Where looks at
-- everything are slow, also flows that may have more: the share is that of the $8
-- that do.
with me as (
    select id from worker_sessions where id = $1 and ended_at is null for key share
),
tenants as materialized (
    select t.queue, t.flow_id, t.priority, t.id, t.place
    from unnest($2::text[], $3::uuid[], $4::smallint[], $5::bigint[]) with ordinality as t (queue, flow_id, priority, id, place)
    where not exists (select from queue_pauses p where p.queue = t.queue)
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
        least(
            ceil($6::bigint::float8 / $8::bigint)::bigint,
            case when l.flow_id is not null then coalesce(o.room, 0) end
        ) as share
    from tenants t
    left join limits l using (queue, flow_id)
    left join open o using (queue, flow_id)
    order by t.place
),
picked as materialized (
    select job.id, s.queue, s.flow_id
    from shares s
    cross join lateral (
        select j.id
        from jobs j
        where j.state = 'ready' and j.queue = s.queue and j.flow_id = s.flow_id
            and (j.priority, j.id) > (s.priority, s.id)
        order by j.priority, j.id
        limit s.share
        for update skip locked
    ) job
    limit $6
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
)
update jobs
set state = 'running',
    lease_epoch = lease_epoch + 1,
    attempt = attempt + 1,
    session_id = $1,
    deadline_at = clock_timestamp() + (timeout_ms + $7) * interval '1 millisecond'
where id = any (array(select id from picked)) and exists (select from me)
returning id, lease_epoch, queue, kind, company_id, flow_id, ref_id, step, item, priority, attempt, crash_count, timeout_ms
