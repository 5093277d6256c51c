-- Commits many attempts at items in one statement: fence, fan, item, and what
-- their lanes do next. A lane gets the next item of its fan, in the order of the
-- batch, or goes where there is none; the last one of a fan wakes the run's job,
-- and whoever has that in hand loses it. Locks go lane, fan, run's job, run.
--
-- A lane whose run has ended or is being closed, or whose fan is gone, goes and writes
-- nothing; where a retry has opened another fan, the lanes of the old one do the same.
with d as materialized (
    select *
    from unnest(
        $1::bigint[], $2::bigint[], $3::uuid[], $4::uuid[], $5::integer[], $6::integer[],
        $7::bigint[], $8::integer[], $9::boolean[], $10::text[], $11::uuid[], $12::integer[],
        $13::text[], $14::text[], $15::bigint[], $16::bigint[], $20::bigint[]
    ) with ordinality as d (
        job_id, epoch, company_id, run_id, step, item,
        delay_ms, again_attempt, stay, status, agent_id, attempt,
        output, error, duration_ms, cost_nanos, booked_nanos, place
    )
),
held as materialized (
    select d.*, f.first_lane
    from d
    cross join lateral (
        select from jobs j
        where j.id = any (array[d.job_id]) and j.lease_epoch = d.epoch and j.session_id = $17 and j.state = 'running'
        for update
    ) j
    left join lateral (
        select f.first_lane
        from run_fans f
        where f.company_id = any (array[d.company_id]) and f.run_id = any (array[d.run_id]) and f.step = d.step
            and d.job_id between f.first_lane and f.last_lane
    ) f on true
),
again as (
    update jobs j
    set state = case when d.delay_ms > 0 then 'scheduled' else 'ready' end,
        due_at = now() + d.delay_ms * interval '1 millisecond',
        lease_epoch = j.lease_epoch + 1,
        attempt = d.again_attempt,
        -- What a suspect was charged with before it began is taken back.
        crash_count = least(j.crash_count, 2),
        session_id = null,
        deadline_at = null
    from held d
    where j.id = any (array[d.job_id]) and d.delay_ms is not null
),
-- Each with the number of its fan, and its own within that.
ended as materialized (
    select h.*,
        (dense_rank() over (order by h.company_id, h.run_id, h.step, h.first_lane))::integer as fan,
        (row_number() over (its order by h.place))::integer as nth,
        (count(*) filter (where h.status = 'completed') over its)::integer as completed,
        (count(*) over its)::integer as over,
        (coalesce(sum(octet_length(h.output)) over its, 0))::bigint as said
    from held h
    where h.delay_ms is null
    window its as (partition by h.company_id, h.run_id, h.step, h.first_lane)
),
fan as materialized (
    select e.company_id, e.run_id, e.step, e.fan, e.over, e.completed, e.said, f.begun, f.round, f.todo is not null as has_todo,
        case
            -- To `least` null is nothing.
            when f.begun is null then null
            when f.failed + e.over - e.completed > f.failures_max then 0
            -- The run would keep more than it may: nothing else begins.
            when f.bytes + e.said > $19 then 0
            else least(e.over, f.size - f.begun)
        end as handed
    from (select * from ended where nth = 1 order by fan) e
    left join lateral (
        select f.*
        from run_fans f
        where f.company_id = any (array[e.company_id]) and f.run_id = any (array[e.run_id]) and f.step = e.step
            and f.first_lane = e.first_lane
            and exists (
                select from runs r
                where r.id = any (array[e.run_id]) and r.company_id is not distinct from e.company_id
                    and r.status = 'running' and r.ending is null
            )
        for update
    ) f on true
),
moved as (
    update run_fans f
    set begun = f.begun + c.handed,
        completed = f.completed + c.completed,
        failed = f.failed + c.over - c.completed,
        lanes = f.lanes - (c.over - c.handed),
        bytes = f.bytes + c.said
    from fan c
    where f.company_id = any (array[c.company_id]) and f.run_id = any (array[c.run_id]) and f.step = c.step
        and c.handed is not null
    returning f.job_id, f.lanes
),
-- By number and not by a join, which without statistics would be a loop in a loop.
fans as materialized (
    select array_agg(begun order by fan) as begun, array_agg(handed order by fan) as handed,
        array_agg(round order by fan) as round, array_agg(has_todo order by fan) as has_todo
    from fan
),
lane as materialized (
    select e.*, fans.round[e.fan] as round,
        case
            when e.nth > fans.handed[e.fan] then null
            when not fans.has_todo[e.fan] then fans.begun[e.fan] + e.nth - 1
            -- While lanes are at work, the list of places stays as it is.
            else (
                select f.todo[fans.begun[e.fan] + e.nth]
                from run_fans f
                where f.company_id = any (array[e.company_id]) and f.run_id = any (array[e.run_id]) and f.step = e.step
            )
        end::integer as next_item
    from ended e
    cross join fans
),
item as (
    insert into run_items as i (
        company_id, run_id, step, item, round, status, agent_id, attempt, cost_nanos, output, bytes, error, duration_ms,
        ended_at
    )
    select company_id, run_id, step, item, round, status, agent_id, attempt, cost_nanos + booked_nanos, output::jsonb,
        octet_length(output), error::jsonb, duration_ms, clock_timestamp()
    from lane
    where round is not null
    on conflict (company_id, run_id, step, item) do update
    set round = excluded.round,
        status = excluded.status,
        agent_id = excluded.agent_id,
        attempt = excluded.attempt,
        cost_nanos = i.cost_nanos + excluded.cost_nanos,
        output = excluded.output,
        bytes = excluded.bytes,
        error = excluded.error,
        duration_ms = excluded.duration_ms,
        ended_at = excluded.ended_at
),
goes_on as (
    update jobs j
    set item = l.next_item,
        state = case when l.stay then 'running' else 'ready' end,
        due_at = now(),
        lease_epoch = j.lease_epoch + 1,
        attempt = case when l.stay then 1 else 0 end,
        crash_count = 0,
        session_id = case when l.stay then j.session_id end,
        deadline_at = case when l.stay then clock_timestamp() + (j.timeout_ms + $18) * interval '1 millisecond' end
    from lane l
    where j.id = any (array[l.job_id]) and l.next_item is not null
),
gone as (
    delete from jobs j
    using lane l
    where j.id = any (array[l.job_id]) and l.next_item is null
),
woken as (
    update jobs j
    set state = 'ready', due_at = now(), lease_epoch = j.lease_epoch + 1, session_id = null, deadline_at = null,
        attempt = 0, crash_count = least(j.crash_count, 2)
    from moved m
    where j.id = any (array[m.job_id]) and m.lanes = 0
    returning j.id
),
spent as (
    insert into ledger (company_id, category, nanos, agent_id, run_id, step)
    select company_id, case when agent_id is null then 'tools' else 'inference' end, cost_nanos, agent_id, run_id, step
    from held
    where cost_nanos > 0
    returning company_id, at, category, nanos, agent_id
),
cost as (
    insert into cost_deltas (company_id, at, agent_id, category, nanos)
    select company_id, at, coalesce(agent_id, '00000000-0000-0000-0000-000000000000'), category, nanos from spent
),
paid as (
    select company_id, run_id, step, sum(cost_nanos)::bigint as nanos from held where cost_nanos > 0
    group by company_id, run_id, step
),
run_paid as (
    update runs r set cost_nanos = r.cost_nanos + p.nanos
    from (select company_id, run_id, sum(nanos)::bigint as nanos from paid group by company_id, run_id) p
    where r.id = any (array[p.run_id]) and r.company_id is not distinct from p.company_id and r.status = 'running'
        -- The run's job is locked before the run.
        and (select count(*) from woken) >= 0
    returning r.id
),
step_paid as (
    update run_steps s set cost_nanos = s.cost_nanos + p.nanos
    from paid p
    where s.company_id = any (array[p.company_id]) and s.run_id = any (array[p.run_id]) and s.step = p.step
        and (select count(*) from run_paid) >= 0
)
select place as "place!", next_item, (select count(*) from woken) > 0 as "woken!" from lane
union all
select place, null, false from held where delay_ms is not null
