"""A user's mistake ends with exit code 2 and one line that names the thing and the way out."""

import importlib
import os
import sys

import pytest
import torch
from conftest import error_lines, free_port, run_script

import common
import sskd


@pytest.fixture(scope="module")
def vgg8_file(tmp_path_factory):
    """A labelled network that halves images three times."""
    path = tmp_path_factory.mktemp("labelled") / "vgg8.pth"
    torch.save(sskd.build_classifier("vgg8", 10).plain().state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch, image_folder, teacher_file, vgg8_file):
    """A working folder with an image folder, a teacher and files that are none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "images").symlink_to(image_folder)
    (tmp_path / "teacher.pth").symlink_to(teacher_file)
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_images" / "train" / "ant").mkdir(parents=True)
    (tmp_path / "broken" / "train" / "ant").mkdir(parents=True)
    for name in ("bad1.jpg", "bad2.jpg"):
        (tmp_path / "broken" / "train" / "ant" / name).write_bytes(b"\xff\xd8\xff no image")
    for split, name in (("train", "ant"), ("train", "bee"), ("val", "ant"), ("val", "cow")):
        (tmp_path / "mixed" / split / name).mkdir(parents=True)
        (tmp_path / "mixed" / split / name / "0.jpg").symlink_to(image_folder / "train" / "ant" / "0.jpg")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "cut.pth").write_bytes(teacher_file.read_bytes()[:10000])
    torch.save({"model": {"encoder.backbone.conv1.weight": torch.zeros(4, 3, 3, 3)}}, tmp_path / "strange.pth")
    torch.save({"epoch": 3}, tmp_path / "no_weights.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"arch": Code("touch ran.txt")}, tmp_path / "code.pth")
    half = torch.load(teacher_file, weights_only=True)
    del half["model"]["encoder.backbone.bn1.weight"]
    torch.save(half, tmp_path / "half.pth")
    torch.save(sskd.build_classifier("resnet8", 7).plain().state_dict(), tmp_path / "seven.pth")
    (tmp_path / "vgg8.pth").symlink_to(vgg8_file)
    (tmp_path / "file").write_text("")
    (tmp_path / "names.txt").write_text("ant/0.jpg\nn1_7.JPEG\n")
    (tmp_path / "torn_run").mkdir()
    (tmp_path / "torn_run" / "config.json").write_text("{")
    (tmp_path / "other_run").mkdir()
    (tmp_path / "other_run" / "backbone.pth").write_text("someone's")
    return tmp_path


class Code:
    """What runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


MOCO = "moco_v2.py --data shapes:64 --arch resnet8 --image-size 16 --batch-size 16 --queue-size 32 --epochs 1"
DISCO = (
    "disco.py --data shapes:64 --student resnet8 --image-size 16 --batch-size 16 --queue-size 32 --epochs 1 --teacher"
)
EVAL = "linear_eval.py --data shapes:64 --image-size 16 --batch-size 16 --knn 5 --epochs 1"
MISTAKES = {
    "disco.py --student resnet8": ["--teacher"],
    "disco.py --teacher teacher.pth": ["--student"],
    "disco.py --teacher teacher.pth --student resnet8": ["data/imagenet", "--data"],
    f"{DISCO} missing.pth": ["missing.pth"],
    f"{DISCO} empty": ["empty"],
    f"{DISCO} text.pth": ["text.pth", "not a readable checkpoint"],
    f"{DISCO} cut.pth": ["cut.pth"],
    f"{DISCO} code.pth": ["code.pth", "could run code"],
    f"{DISCO} strange.pth": ["strange.pth", "conv1.weight [4, 3, 3, 3]", "MoCo v1 and v2"],
    f"{DISCO} no_weights.pth": ["no_weights.pth"],
    f"{DISCO} list.pth": ["list.pth"],
    f"{DISCO} half.pth": ["half.pth", "bn1.weight"],
    f"{DISCO} vgg8.pth --image-size 4": ["vgg8.pth", "4 pixels", "--image-size"],
    f"{DISCO} teacher.pth --teacher-arch resnet20": ["teacher.pth as resnet20", "Missing"],
    f"{DISCO} teacher.pth --student efficientnet_b9": ["efficientnet_b9", "did you mean efficientnet_b"],
    f"{DISCO} teacher.pth --teacher-bn train": ["train", "running"],
    f"{DISCO} teacher.pth --distill-weight -1": ["--distill-weight", "-1"],
    f"{DISCO} teacher.pth --hidden-dim 0": ["--hidden-dim", "0"],
    f"{DISCO} teacher.pth --out file": ["file", "--out"],
    f"{DISCO} teacher.pth --out other_run": ["backbone.pth", "--out"],
    f"{MOCO} --data nowhere": ["nowhere", "--data"],
    f"{MOCO} --data empty": ["empty/train", "--data"],
    f"{MOCO} --data no_images": ["no_images/train"],
    f"{MOCO} --data broken --batch-size 1 --workers 0": ["broken/train/ant/bad", "remove"],
    f"{MOCO} --data broken --batch-size 1 --workers 1": ["broken/train/ant/bad", "remove"],
    f"{MOCO} --data shapes:many": ["shapes:many", "shapes:2000"],
    f"{MOCO} --data shapes:5": ["shapes:5"],
    f"{MOCO} --data cifar10 --data-root file": ["cifar10", "--data-root"],
    f"{MOCO} --arch resnet9": ["resnet9", "did you mean"],
    f"{MOCO} --arch xyz": ["xyz", "torchvision"],
    f"{MOCO} --arch vgg11_bn": ["vgg11_bn", "16", "--image-size"],
    f"{MOCO} --batch-size 100 --queue-size 100": ["--batch-size 100", "64"],
    f"{MOCO} --batch-size many": ["--batch-size", "many"],
    f"{MOCO} --lr 0": ["--lr", "0"],
    f"{MOCO} --lr nan": ["--lr", "nan"],
    f"{MOCO} --momentum 2": ["--momentum", "2"],
    f"{MOCO} --weight-decay -1": ["--weight-decay", "-1"],
    f"{MOCO} --workers -1": ["--workers", "-1"],
    f"{MOCO} --queue 5 --colour": ["--colour"],
    f"{MOCO} --queue-size 8": ["--queue-size 8", "--batch-size 16"],
    f"{MOCO} --checkpoint-minutes 0": ["--checkpoint-minutes", "0"],
    f"{MOCO} --max-bad-images -1": ["--max-bad-images", "-1"],
    f"{MOCO} --image-size 0": ["--image-size", "0"],
    f"{MOCO} --epochs 0.5": ["--epochs", "0.5"],
    f"{MOCO} --amp fp8": ["--amp", "fp8", "bf16"],
    f"{MOCO} --arch vit_b_16 --image-size 20": ["vit_b_16", "20"],
    f"{MOCO} --data file": ["file/train", "--data"],
    f"{MOCO} --out torn_run": ["torn_run/config.json", "--out"],
    f"RANK=zero WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1 {MOCO}": ["zero", "torchrun"],
    f"RANK=0 WORLD_SIZE=1 MASTER_PORT=1 {MOCO}": ["MASTER_ADDR", "torchrun"],
    f"RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=99999 {MOCO}": ["port", "torchrun"],
    f"{EVAL} --weights": ["--weights"],
    f"{EVAL} --weights missing.pth": ["missing.pth"],
    f"{EVAL} --weights random": ["random", "--arch"],
    f"{EVAL} --weights torchvision --arch resnet8": ["resnet8"],
    f"{EVAL} --weights torchvision --arch inception_v3": ["inception_v3"],
    f"{EVAL} --weights teacher.pth --finetune --lr 1 3": ["--finetune", "one --lr"],
    f"{EVAL} --weights teacher.pth --finetune --cached": ["--finetune", "--cached"],
    f"{EVAL} --weights teacher.pth --schedule cosine": ["--schedule", "cosine", "halvings"],
    f"{EVAL} --weights teacher.pth --label-list names.txt": ["names.txt", "--label-fraction"],
    f"{EVAL} --weights teacher.pth --data images --label-list file": ["--label-list file", "no image"],
    f"{EVAL} --weights teacher.pth --data images --label-list names.txt": ["names.txt", "n1_7.JPEG"],
    f"{EVAL} --weights teacher.pth --data images --label-list missing.txt": ["missing.txt"],
    f"{EVAL} --weights vgg8.pth --image-size 4": ["vgg8.pth", "4 pixels", "--image-size"],
    f"{EVAL} --weights teacher.pth --knn 200": ["--knn 200", "64"],
    f"{EVAL} --weights teacher.pth --batch-size 100": ["--batch-size 100"],
    f"{EVAL} --weights teacher.pth --data mixed": ["mixed", "different classes", "bee"],
    f"{EVAL} --weights teacher.pth teacher.pth": ["teacher.pth", "twice"],
}
SEED = DISCO.replace("disco", "seed")
MISTAKES |= {
    line.replace("disco", "seed"): words  # what holds there holds here
    for line, words in MISTAKES.items()
    if line.startswith("disco") and not any(flag in line for flag in ("--teacher-bn", "--distill-weight"))
} | {
    f"{SEED} teacher.pth --objective kl": ["--objective", "kl", "contrastive"],
    f"{SEED} teacher.pth --small-crops -1": ["--small-crops", "-1"],
    f"{SEED} teacher.pth --teacher-temperature 0": ["--teacher-temperature", "0"],
    f"{SEED} teacher.pth --student vgg11 --image-size 40 --small-crops 2": ["vgg11", "17 pixels", "--small-size"],
}
SSKD = "sskd.py --data shapes:64 --image-size 16 --batch-size 16 --epochs 1"
MISTAKES |= {
    SSKD: ["--train-teacher NAME", "--teacher FILE", "--student NAME"],
    f"{SSKD} --teacher labelled.pth": ["--student NAME"],
    f"{SSKD} --train-teacher resnet8 --teacher labelled.pth --student resnet8": ["either", "--train-teacher NAME"],
    f"{SSKD} --train-teacher resnet8 --student resnet20": ["either", "--train-teacher NAME"],
    f"{SSKD} --train-teacher resnet9": ["resnet9", "did you mean"],
    f"{SSKD} --train-teacher squeezenet1_1 --image-size 32": ["squeezenet1_1", "linear classifier"],
    f"{SSKD} --teacher missing.pth --student resnet8": ["missing.pth"],
    f"{SSKD} --teacher teacher.pth --student resnet8": ["teacher.pth", "no linear classifier"],
    f"{SSKD} --teacher seven.pth --student resnet8": ["seven.pth", "7 classes", "10"],
    f"{SSKD} --teacher torchvision --student resnet8": ["--teacher-arch"],
    f"{SSKD} --train-teacher resnet8 --label-fraction 0": ["--label-fraction", "0"],
    f"{SSKD} --train-teacher resnet8 --label-fraction 0.1": ["--batch-size 16", "10 training images"],
    f"{SSKD} --train-teacher resnet8 --label-noise 2": ["--label-noise", "2"],
    f"{SSKD} --train-teacher resnet8 --kd-weight 0.5": ["--train-teacher", "leave out --kd-weight"],
    f"{SSKD} --train-teacher resnet8 --ce-weight 0": ["--ce-weight", "all 0"],
    f"{SSKD} --teacher vgg8.pth --student resnet8 --image-size 4": ["vgg8.pth", "4 pixels", "--image-size"],
    f"{SSKD} --teacher seven.pth --student resnet8 --ss-weight -1": ["--ss-weight", "-1"],
    f"{SSKD} --teacher seven.pth --student resnet8 --kd-temperature 0": ["--kd-temperature", "0"],
}


@pytest.mark.parametrize("line", MISTAKES, ids=[" ".join(line.split()[-3:]) for line in MISTAKES])
def test_a_mistake_is_one_line(line, folder, monkeypatch, capfd):
    variables = [word.split("=") for word in line.split(" ") if "=" in word]
    script, *arguments = line.split(" ")[len(variables) :]
    for name, value in variables:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stop:
        common.run_script(importlib.import_module(script.removesuffix(".py")).main)
    lines = error_lines(capfd.readouterr().err)
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), lines
    for word in MISTAKES[line]:
        assert word in lines[0], lines[0]
    assert not (folder / "ran.txt").exists()
    assert (folder / "other_run" / "backbone.pth").read_text() == "someone's"


def test_another_run_in_the_same_folder_is_refused_and_named(folder, monkeypatch, capfd):
    def run(line):
        monkeypatch.setattr(sys, "argv", line.split())
        common.run_script(importlib.import_module(line.split(".")[0]).main)

    run(MOCO + " --out run")
    run(MOCO + " --out run --workers 3")  # does not change the result
    before = (folder / "run" / "checkpoint.pth").read_bytes()
    capfd.readouterr()
    for other, words in (
        (" --lr 0.5", ["lr 0.03 there, 0.5 here"]),
        (" --queue-size 20", ["queue-size 32 there, 20 here"]),
    ):
        with pytest.raises(SystemExit):
            run(MOCO + " --out run" + other)
        message = capfd.readouterr().err
        assert all(word in message for word in ["run holds another run", *words])
    assert (folder / "run" / "checkpoint.pth").read_bytes() == before


ON_TWO = {
    f"{MOCO} --batch-size 15": ["--batch-size 15", "2 processes"],
    f"{MOCO} --arch resnet9": ["resnet9"],
    f"{MOCO} --lr hot": ["--lr", "hot"],
    f"{MOCO} --data nowhere": ["nowhere"],
    f"{MOCO} --data broken --batch-size 2 --workers 0": ["broken/train/ant/bad"],
    f"{MOCO} --data cifar10 --data-root file": ["cifar10", "--data-root"],
    f"{MOCO} --out other_run": ["backbone.pth", "--out"],
    f"{MOCO} --queue-size 8": ["--queue-size 8"],
    f"{DISCO} missing.pth": ["missing.pth"],
    f"{DISCO} code.pth": ["could run code"],
    f"{EVAL} --weights random": ["--arch"],
}


def make_mistakes(rank, ports, folder):
    """One of two processes: forks for every mistake, writes what it prints and its exit code into files."""
    os.chdir(folder)
    for number, (line, port) in enumerate(zip(ON_TWO, ports, strict=True)):
        child = os.fork()
        if not child:
            where = f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT={port} {line}"
            where = where.split()
            os.environ.update(word.split("=") for word in where if "=" in word)
            os.dup2(os.open(f"{number}.{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
            sys.argv = [word for word in where if "=" not in word]
            common.run_script(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
        status = os.waitpid(child, 0)[1]
        (folder / f"{number}.{rank}.code").write_text(str(os.waitstatus_to_exitcode(status)))


def test_two_processes_tell_a_mistake_once(folder):
    ports = [free_port() for _ in ON_TWO]
    torch.multiprocessing.spawn(make_mistakes, (ports, folder), nprocs=2)
    for number, (line, words) in enumerate(ON_TWO.items()):
        lines = [line for rank in (0, 1) for line in error_lines((folder / f"{number}.{rank}.txt").read_text())]
        assert len(lines) == 1 and all(word in lines[0] for word in words), (line, lines)
        assert [(folder / f"{number}.{rank}.code").read_text() for rank in (0, 1)].count("2") >= 1, line


def test_torchrun_shows_one_line_and_its_own_report(folder):
    done = run_script(f"{DISCO} missing.pth", processes=2, cwd=folder, check=False)
    lines = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr and len(lines) == 1 and "missing.pth" in lines[0]
    assert done.stderr.count("Traceback") == done.stderr.count("ChildFailedError(") == 1


def test_exit_code_is_2_from_the_shell(tmp_path):
    done = run_script("disco.py --teacher none.pth --student resnet8", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr == "disco.py: error: no file none.pth\n"


# ------------------------------------------------------------------------------------------------------------- Defaults


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="macOS")
@pytest.mark.parametrize("cores, processes, workers", [(3, 1, 3), (32, 1, 8), (6, 2, 3), (1, 4, 1)])
def test_as_many_workers_as_the_process_has_cores(cores, processes, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    parser = common.common_parser("disco", "", epochs=1, batch_size=1, lr=1, weight_decay=0)
    assert parser.parse_args([]).workers == workers
