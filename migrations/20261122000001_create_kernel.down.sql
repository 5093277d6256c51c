drop table dead_letters, approvals, events, run_steps, runs, worker_sessions, jobs,
    playbook_versions, playbooks, agents, companies, api_keys, accounts;
drop function refuse_transition();
