/**
 * Processes known for certain, also after the engine that started them is gone: by id, time of start and boot,
 * because ids are used again. Each is the leader of a session, and its session is ended whole.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';

export interface ProcessMark {
  pid: number;
  /** Opaque: when the process started. The same id with another value is another process. */
  started: string;
}

interface Entry {
  pid: number;
  session: number;
  started: string;
}

const hasProc = existsSync('/proc/self/stat');

/** Null when the process is gone, or is only a zombie that nobody has reaped. */
function procEntry(pid: number, boot: string): Entry | null {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    // The command's name comes second, in brackets, and may hold anything; fields are counted from behind it.
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    const [state = 'X', , , session = '0'] = fields;
    if (state === 'Z' || state === 'X') return null;
    return { pid, session: Number(session), started: `${boot}/${fields[19]}` };
  } catch {
    return null;
  }
}

function processes(): Entry[] {
  if (hasProc) {
    const boot = readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
    return readdirSync('/proc')
      .filter((name) => /^\d+$/.test(name))
      .map((name) => procEntry(Number(name), boot))
      .filter((entry) => entry !== null);
  }
  // Without /proc the process group stands for the session: our leaders lead both.
  const table = execFileSync('ps', ['-A', '-o', 'pid=,pgid=,stat=,lstart='], { encoding: 'utf8' });
  return table
    .split('\n')
    .map((line) => /^\s*(\d+)\s+(\d+)\s+(\S+)\s+(.+?)\s*$/.exec(line))
    .filter((match) => match !== null && !match[3]?.startsWith('Z'))
    .map((match) => ({ pid: Number(match?.[1]), session: Number(match?.[2]), started: match?.[4] ?? '' }));
}

/** The mark of a living process; null when there is none of that id. */
export function markOf(pid: number): ProcessMark | null {
  const entry = processes().find((candidate) => candidate.pid === pid);
  return entry ? { pid, started: entry.started } : null;
}

/** Ids of the living processes of the session that `leader` leads or led. */
export function sessionOf(leader: ProcessMark): number[] {
  const all = processes();
  const holder = all.find((entry) => entry.pid === leader.pid);
  // The kernel gives out an id anew only when no session carries it, so another holder means that ours is over.
  if (holder && holder.started !== leader.started) return [];
  const boot = leader.started.split('/')[0];
  return all
    .filter((entry) => entry.session === leader.pid && (!hasProc || entry.started.startsWith(`${boot}/`)))
    .map((entry) => entry.pid);
}

/** Signals every process of the session; those already gone are passed over. */
export function signalSession(leader: ProcessMark, signal: NodeJS.Signals): void {
  for (const pid of sessionOf(leader)) {
    try {
      process.kill(pid, signal);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
    }
  }
}

/** Kills the session and returns when nothing of it lives. Throws when it cannot be ended. */
export async function endSession(leader: ProcessMark): Promise<void> {
  for (let attempt = 0; attempt < 500; attempt++) {
    if (sessionOf(leader).length === 0) return;
    signalSession(leader, 'SIGKILL');
    await new Promise((resolve) => setTimeout(resolve, 10 + attempt));
  }
  throw new Error(`The processes of session ${leader.pid} do not end; end them, then start again.`);
}
