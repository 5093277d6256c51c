drop function run_killed(uuid, uuid);
